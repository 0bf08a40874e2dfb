"""`precalib quantize --ray` on two Ray nodes of one CPU each, on this machine."""

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
from tiny_models import GROUPED_QUERY_CONFIG

from offline_quantize.checkpoint import ray_pool
from offline_quantize.checkpoint.atomic_files import JOURNAL
from offline_quantize.checkpoint.ray_pool import Failure, carry_out
from precalib_kernels.errors import OutputError, SourceError, UnfitError, UsageError

RUN = "from offline_quantize.cli.main import main; main()"
SOFTWARE = ray_pool.software()


@pytest.fixture(scope="module")
def nodes():
    """Set up for tests that only use them; a test that kills one starts its own."""
    pytest.importorskip("ray")
    from ray_cluster import ENVIRONMENT, RayCluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        cluster = RayCluster()
        yield cluster
        cluster.stop()


@pytest.fixture
def many(checkpoint, weights):
    """A checkpoint of several files and a few hundred tensors."""
    config = {"model_type": "llama", "num_hidden_layers": LAYERS}
    return checkpoint("many", weights().llama(LAYERS), shards=3, config=config)


LAYERS = 20


def start(*arguments):
    """The command in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", RUN, "quantize", *map(str, arguments)])


def wait_for_tensors(process, target, count):
    """Until so many tensors are in the journal; the process may not have ended by then."""
    end = time.monotonic() + 120
    while not (target / JOURNAL).exists() or (target / JOURNAL).read_bytes().count(b"\n") < count:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--recipe", "balanced-3"], ["--transform", "value-output"]])
def test_a_cluster_writes_the_same_bytes(checkpoint, quantize, contents, nodes, options):
    source = checkpoint(shards=2, config=GROUPED_QUERY_CONFIG)
    alone = contents(quantize(source, "--jobs", 1, *options, target="alone"))
    assert contents(quantize(source, "--ray", nodes.address, *options, target="many")) == alone


@pytest.mark.slow
def test_feedback_on_a_cluster(byte_llama, quantize, contents, nodes, monkeypatch):
    """Statistics of inputs go to the cluster block by block."""
    source = byte_llama(hidden_size=128, intermediate_size=160)
    options = ["--feedback", "--activations", "random", "--activation-tokens", "64"]
    alone = contents(quantize(source, "--jobs", 1, *options, target="alone"))
    sent = []

    put = pytest.importorskip("ray").put

    def counted(value):
        sent.append(value)
        return put(value)

    monkeypatch.setattr("ray.put", counted)
    assert contents(quantize(source, "--ray", nodes.address, *options, target="many")) == alone
    sizes = [hessian.shape[0] for _, hessian in sent]
    assert sorted(sizes) == sorted([128, 128, 128, 160] * (len(sent) // 4))  # not one per weight
    assert sizes


@pytest.mark.slow
def test_a_run_goes_on_here_or_there(many, quantize, contents, tmp_path, nodes):
    """Killed on the cluster, continued there, killed again, and finished by threads."""
    expected = contents(quantize(many, "--jobs", 1, target="alone"))
    target = tmp_path / "target"
    for count, resume in ((20, []), (90, ["--resume"])):
        process = start(many, target, "--ray", nodes.address, *resume)
        wait_for_tensors(process, target, count)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = (target / JOURNAL).read_bytes().count(b"\n")
    assert 90 <= done < 9 * LAYERS
    assert contents(quantize(many, "--resume")) == expected


@pytest.mark.slow
def test_a_node_that_dies_while_it_works(many, quantize, contents, tmp_path):
    pytest.importorskip("ray")
    from ray_cluster import RayCluster

    expected = contents(quantize(many, "--jobs", 1, target="alone"))
    target = tmp_path / "target"
    cluster = RayCluster()
    try:
        process = start(many, target, "--ray", cluster.address)
        wait_for_tensors(process, target, 20)
        cluster.kill(1)
        assert (target / JOURNAL).read_bytes().count(b"\n") < 9 * LAYERS
        assert process.wait(300) == 0
    finally:
        cluster.stop()
    assert contents(target) == expected


@pytest.mark.slow
def test_refusals_are_those_of_threads(checkpoint, weights, precalib, tmp_path, nodes):
    tensors = weights().llama()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    source, target = checkpoint(tensors=tensors), tmp_path / "target"
    alone = precalib("quantize", source, target, "--recipe", "rtn-4")
    assert "model.layers.1.mlp.up_proj.weight" in alone.sentence
    ran = precalib("quantize", source, target, "--recipe", "rtn-4", "--ray", nodes.address)
    assert ran.err == alone.err
    assert not target.exists()


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("nonsense", "is no address of a Ray cluster; give HOST:PORT of its head"),
        ("ray://127.0.0.1:10001", "is no address of a Ray cluster"),
        ("127.0.0.1:70000", "is no address of a Ray cluster"),
        ("127.0.0.1:1", "nothing answers there (Connection refused); start a cluster"),
        ("no-such-host.invalid:6379", "nothing answers there"),
    ],
)
def test_an_address_without_a_cluster(checkpoint, precalib, tmp_path, address, text):
    pytest.importorskip("ray")
    source, target = checkpoint(), tmp_path / "target"
    ran = precalib("quantize", source, target, "--recipe", "rtn-4", "--ray", address)
    assert ran.sentence.startswith(f"precalib: --ray {address}: {text}")
    assert not target.exists()


def test_a_cluster_that_does_not_take_us(checkpoint, precalib, tmp_path, monkeypatch):
    """Another version of Ray, or none on this machine."""
    ray = pytest.importorskip("ray")

    def refuse(**_):
        raise ConnectionError("Could not find any\nrunning Ray instance.")

    monkeypatch.setattr(ray, "init", refuse)
    ran = precalib("quantize", checkpoint(), tmp_path / "target", "--ray", "auto")
    assert ran.sentence == (
        "precalib: --ray auto: the cluster cannot be joined "
        "(Could not find any running Ray instance.)"
    )
    assert not (tmp_path / "target").exists()


def test_without_the_package(checkpoint, precalib, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = precalib("quantize", checkpoint(), tmp_path / "target", "--ray", "auto")
    assert ran.sentence == "precalib: --ray needs the package ray; install it: pip install ray"


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (["--jobs", "2"], "--jobs is for this machine's threads; leave it out with --ray"),
        (["--device", "meta"], "--ray computes on CPUs; leave out --device"),
    ],
)
def test_options_that_exclude_each_other(precalib, tmp_path, monkeypatch, option, text):
    monkeypatch.setattr("offline_quantize.cli.main.check_device", lambda _: None)
    ran = precalib("quantize", tmp_path, tmp_path / "target", "--ray", "auto", *option)
    assert ran.sentence == f"precalib: {text}"


class TestCarryOut:
    """What a worker answers, after its way through pickle."""

    @staticmethod
    def answer(error):
        def fail():
            raise error

        failure = carry_out(fail, SOFTWARE)
        assert isinstance(failure, Failure)
        return pickle.loads(pickle.dumps(failure)).raised()

    def test_what_a_task_returns(self):
        assert carry_out(lambda: 3, SOFTWARE) == 3

    def test_bytes_are_on_disk_before_the_journal_says_so(self):
        assert ray_pool.RayPool.flags & os.O_DSYNC

    def test_files_that_this_machine_does_not_see(self):
        missing = FileNotFoundError(2, "No such file or directory", "/shared/model")
        unread = SourceError("/shared/model: cannot be read (No such file or directory); try again")
        unread.__cause__ = missing
        for raised in (missing, unread):
            error = self.answer(raised)
            assert isinstance(error, OutputError)
            assert str(error).startswith("/shared/model: is not there on machine ")

    def test_a_source_that_cannot_be_read_now(self):
        error = SourceError("/shared/model: cannot be read (Input/output error); try again")
        error.__cause__ = OSError(5, "Input/output error", "/shared/model")
        found = self.answer(error)
        assert isinstance(found, SourceError)
        assert isinstance(found.__cause__, OSError)  # so that what was written is kept

    def test_weights_that_do_not_fit(self):
        error = self.answer(UnfitError("too large"))
        assert isinstance(error, UnfitError)
        assert error.__cause__ is None

    def test_a_full_disk(self):
        error = self.answer(OSError(28, "No space left on device", "/shared/a"))
        assert (error.errno, error.filename) == (28, "/shared/a")

    def test_other_software(self):
        other = "precalib 0.0.1, torch 2.9.0 on x86_64 with vectors"
        failure = carry_out(lambda: None, other)
        assert isinstance(failure.error, UsageError)
        assert f"has {SOFTWARE} and not {other}, whose bytes may differ" in str(failure.error)

    def test_instructions_that_round_otherwise_are_other_software(self, monkeypatch):
        def name(capability):
            monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
            return ray_pool.software()

        assert name("AVX2") == name("AVX512") != name("DEFAULT")

    def test_errors_that_are_nobodys_fault_but_ours(self):
        with pytest.raises(ZeroDivisionError):
            carry_out(lambda: 1 / 0, SOFTWARE)
