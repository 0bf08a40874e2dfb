// Calls the x86 kernels from several threads at once, as a program without torch: for
// ThreadSanitizer.
//
//   call_products PROBLEMS CALLERS ROUNDS
//
// PROBLEMS is a file as run_products.cpp reads it. Each problem is computed alone; then CALLERS
// threads compute all of them at once, ROUNDS times and each in another order, into memory of their
// own. Exit code 1 if a result is another than alone.
//
// GNU's OpenMP synchronizes in ways that ThreadSanitizer cannot see. The few functions of it that
// the kernels call are defined here, on top of std::thread and std::barrier.
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../../kernels/precalib_kernels/backends/x86/csrc/gather_rows.h"
#include "../../kernels/precalib_kernels/backends/x86/csrc/isa_dispatch.h"

using namespace precalib;

namespace {

constexpr int kTeam = 3;  // threads of a parallel region

struct Team {
  int size;
  std::barrier<> barrier;
  explicit Team(int size) : size(size), barrier(size) {}
};
thread_local Team* team = nullptr;
thread_local int number = 0;  // of the thread in its team

void take_part(Team& in, int as, void (*run)(void*), void* data) {
  Team* const outer_team = team;
  const int outer_number = number;
  team = &in;
  number = as;
  run(data);
  team = outer_team;
  number = outer_number;
}

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "call_products: %s\n", why);
  std::exit(1);
}

// Bytes at a multiple of 64.
struct Bytes {
  std::vector<char> memory;
  explicit Bytes(int64_t size) : memory(size_t(size) + 64) {}
  char* data() { return memory.data() + -(uintptr_t)memory.data() % 64; }
};

struct Problem {
  int64_t rows, type, isa;
  Bytes layout, packed, x, bias, expected;
  bool has_bias;
  int64_t result_size;
  X86Layout made;
};

Bytes read(std::FILE* file, int64_t size) {
  Bytes bytes(size);
  if (std::fread(bytes.data(), 1, size_t(size), file) != size_t(size)) fail("cut short");
  return bytes;
}

void compute(Problem& problem, char* y) {
  const uint8_t* const packed = (const uint8_t*)problem.packed.data();
  if (problem.isa < 0) {
    gather_rows(problem.made, packed, (const int64_t*)problem.x.data(), problem.rows,
                Type(problem.type), y);
    return;
  }
  if (problem.isa >= supported_isas().count) fail("this machine lacks the ISA");
  const void* const bias = problem.has_bias ? problem.bias.data() : nullptr;
  linear(supported_isas().isas[problem.isa],
         {&problem.made, packed, problem.x.data(), bias, y, problem.rows, problem.type, {}});
}

bool compute_all(std::vector<Problem>& problems, size_t first) {
  bool right = true;
  for (size_t i = 0; i < problems.size(); ++i) {
    Problem& problem = problems[(first + i) % problems.size()];
    Bytes y(problem.result_size);
    compute(problem, y.data());
    right &= !std::memcmp(y.data(), problem.expected.data(), size_t(problem.result_size));
  }
  return right;
}

}  // namespace

extern "C" void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned) {
  Team made(threads ? int(threads) : kTeam);
  std::vector<std::thread> others;
  for (int i = 1; i < made.size; ++i)
    others.emplace_back([&made, i, run, data] { take_part(made, i, run, data); });
  take_part(made, 0, run, data);
  for (std::thread& other : others) other.join();
}
extern "C" void GOMP_barrier() {
#if !defined(WITHOUT_BARRIERS)  // to see that a race is found
  if (team) team->barrier.arrive_and_wait();
#endif
}
extern "C" int omp_get_max_threads() { return kTeam; }
extern "C" int omp_get_num_threads() { return team ? team->size : 1; }
extern "C" int omp_get_thread_num() { return number; }

int main(int count, char** words) {
  if (count != 4) fail("usage: call_products PROBLEMS CALLERS ROUNDS");
  std::FILE* const in = std::fopen(words[1], "rb");
  const int callers = std::atoi(words[2]), rounds = std::atoi(words[3]);
  if (!in) fail("cannot open its file");
  std::vector<Problem> problems;
  int64_t head[8];
  while (std::fread(head, sizeof head, 1, in) == 1) {
    problems.push_back({head[0], head[1], head[2], read(in, head[3]), read(in, head[4]),
                        read(in, head[5]), read(in, head[6]), Bytes(head[7]), head[6] != 0, head[7],
                        X86Layout{}});
    Problem& problem = problems.back();
    std::memcpy(&problem.made, problem.layout.data(), sizeof problem.made);
  }
  std::fclose(in);
  for (Problem& problem : problems) {  // they do not move any more
    problem.made.shard_rows = (const int64_t*)(problem.layout.data() + sizeof problem.made);
    compute(problem, problem.expected.data());
  }
  std::vector<char> right(size_t(callers), 1);
  for (int round = 0; round < rounds; ++round) {
    std::vector<std::thread> threads;
    for (int i = 0; i < callers; ++i)
      threads.emplace_back([&problems, &right, i, round] {
        right[size_t(i)] &= compute_all(problems, size_t(i * 7 + round));
      });
    for (std::thread& thread : threads) thread.join();
  }
  for (char each : right)
    if (!each) fail("a result differs from the one computed alone");
  std::printf("%zu problems, %d callers, %d rounds\n", problems.size(), callers, rounds);
}
