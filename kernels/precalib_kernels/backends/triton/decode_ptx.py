"""From packed words to fp16 in NVIDIA's assembler; `decode` has the same in plain Triton.

A half holds 1024 + byte: the bits of fp16 1024.0 are 0x6400, and its last place is worth one. So
a code becomes a number by putting it into the low bits, without a conversion, and the `offset`
is taken off once per group instead of once per weight. `prmt` looks up four codes at a time in
eight bytes (two registers): the four nibbles of a selector are the codes themselves. Codes of five
bits lie apart: nibbles of four, and a register that has the fifth at the top of each nibble.
"""

from precalib_kernels.backends.triton.memory_layout import TritonLayout

_BLEND = "0xe4"  # lop3: third operand's ones take the first, its zeros the second
_XOR3 = "0x96"
_OR_XOR = "0x56"  # (first | second) ^ third
_AND_OR = "0xea"  # (first & second) | third
_OR_AND = "0xa8"  # (first | second) & third
_OR_AND_NOT = "0x54"  # (first | second) & ~third


def assembler(form: TritonLayout) -> str:
    """PTX that turns the nibble tiles of a chain into the fp16 values of their dots.

    Operands: 4·J outputs; with a table the first rows of `constants`, two if it is in place, else
    three, and with five bits also the last two; with a trellis its fourth row and the pair's carry,
    twice; in place the classes, then slope and offset for each dot of a tile; with five bits the
    tile of fifth bits, those of the chain's first tile at the top of nibbles; J tiles. Every
    register holds two neighbouring int16 or fp16 elements.
    """
    tiles = form.chain_tiles
    text = [".reg .b32 p, q, f, x, s, m, a, b, c, d, lo, hi, low, high, ones, low2, high2;"]
    first, lines = 4 * tiles, []
    for name in ("low", "high", "ones", "low2", "high2")[: _rows(form)]:
        text.append(f"mov.b32 {name}, ${first};")
        first += 1
    if form.mode == "trellis":
        mask = 0x88 << 24 >> max(0, 4 - form.bits)
        text += [f"shl.b32 p, ${first + 1}, ${first};", f"and.b32 p, p, {mask:#x};"]
        first += 2
    if form.inline_salient:
        text.append(f"mov.b32 p, ${first};")
        lines = [(f"${first + i}", f"${first + i + 1}") for i in (1, 3, 5, 7)]
        first += 9
    fifth = f"${first}"
    first += form.bits == 5
    for tile in range(tiles):
        word, out = f"${first + tile}", [f"${4 * tile + i}" for i in range(4)]
        if form.inline_salient:
            text += _in_place(form, word, lines, out)
        elif form.mode == "uniform":
            text += _uniform(form.bits, word, out, fifth)
        elif form.bits == 5:
            text += _wide_lookup(form, word, fifth, tile, out)
        else:
            text += _lookup(form, word, out)
    return "{\n" + "\n".join(text) + "\n}"


def constraints(form: TritonLayout) -> str:
    """Register classes of `assembler`'s operands."""
    inputs = _rows(form) + 2 * (form.mode == "trellis") + 9 * form.inline_salient
    inputs += (form.bits == 5) + form.chain_tiles
    return ",".join(["=r"] * (4 * form.chain_tiles) + ["r"] * inputs)


def _rows(form: TritonLayout) -> int:
    """Rows of `constants` that are looked up in, and what becomes masks."""
    if form.mode == "uniform":
        return 0
    return 2 if form.inline_salient else 5 if form.bits == 5 else 3


def table_words(form: TritonLayout) -> list[int]:
    """The lookup's 16 bytes as four words; of five bits its 32 as eight."""
    size = 32 if form.bits == 5 else 16
    entries = (*form.table, *[0] * size)[:size]
    return [int.from_bytes(entries[i : i + 4], "little") for i in range(0, size, 4)]


def constants(form: TritonLayout) -> list[list[int]]:
    """Words [4, 8] that the assembler takes from memory: what each pair of words needs.

    Table words, the bytes that become masks, and the shift that brings a pair's carry to the top
    of a word; with five bits [6, 8], the last two being table words again. They come as data since
    ptxas copies known constants before every use.
    """
    low, _, high, _, *more = table_words(form)
    ones = 0x80808080 if form.mode == "trellis" else 0x0000FF00
    shifts = [pair + pair // 4 * 4 for pair in range(8)]
    return [[low] * 8, [high] * 8, [ones] * 8, shifts, *([word] * 8 for word in more[::2])]


def spare_assembler(bits: int) -> str:
    """PTX that makes the nibble tile which is not stored: of three tiles, or of one."""
    if bits == 2:
        return "shr.b32 $0, $1, 2;"
    return """{
        .reg .b32 a, b, c;
        shr.b32 a, $1, 3;
        shr.b32 b, $2, 2;
        shr.b32 c, $3, 1;
        and.b32 a, a, 0x11111111;
        lop3.b32 a, b, 0x22222222, a, 0xea;
        lop3.b32 $0, c, 0x44444444, a, 0xea;
    }"""


def _uniform(bits: int, word: str, out: list[str], fifth: str) -> list[str]:
    """Odd nibbles stay where they are and count sixteenfold; x is a sixteenth there."""
    mask, magic = (1 << min(bits, 4)) - 1, "0x64006400"
    even, odd = f"{mask * 0x10001:#x}", f"{mask * 0x100010:#x}"
    lines = [
        f"shr.b32 s, {word}, 8;",
        f"lop3.b32 {out[0]}, {word}, {even}, {magic}, {_AND_OR};",
        f"lop3.b32 {out[1]}, {word}, {odd}, {magic}, {_AND_OR};",
        f"lop3.b32 {out[2]}, s, {even}, {magic}, {_AND_OR};",
        f"lop3.b32 {out[3]}, s, {odd}, {magic}, {_AND_OR};",
    ]
    if bits == 5:  # its place is above that of the nibble
        lines += [f"shl.b32 x, {fifth}, 1;", f"shr.b32 s, {fifth}, 7;"]
        for i, half in enumerate(out):
            bit = ("0x100010", "0x1000100")[i % 2]
            lines.append(f"lop3.b32 {half}, {'xs'[i // 2]}, {bit}, {half}, {_AND_OR};")
    return lines


def _in_place(
    form: TritonLayout, word: str, lines: list[tuple[str, str]], out: list[str]
) -> list[str]:
    """Codes, or their bytes of the table, as fp16 numbers in subnormal units.

    Fewer than 1024 of these units are their own bits. Where p has a sign bit, slope times code plus
    offset.
    """
    codes, mask = [word, "f"], ((1 << form.bits) - 1) * 0x10001
    if form.mode == "uniform":
        codes[0], mask = "q", mask << 2
        text = [f"shl.b32 q, {word}, 2;", f"shr.b32 f, {word}, 6;"]
    else:
        text = [*_columns(form, word), f"shr.b32 f, {word}, 8;"]
    for i, half in enumerate(out):
        slope, offset = lines[i]
        if i == 2:
            text.append("shl.b32 p, p, 1;")
        text += [
            f"prmt.b32 m, p, p, {('0xbb99', '0xaa88')[i % 2]};",
            f"and.b32 x, {codes[i // 2]}, {mask << i % 2 * 4:#x};",
            f"fma.rn.f16x2 a, x, {slope}, {offset};",
        ]
        if form.mode == "table":  # a byte of either column, its sign, which is zero, above it
            text.append(f"prmt.b32 x, lo, hi, {0xC480 + 0x1111 * i:#x};")
        text.append(f"lop3.b32 {half}, a, x, m, {_BLEND};")
    return text


def _columns(form: TritonLayout, word: str) -> list[str]:
    """Bytes of the four codes in the lower half of a word to lo, of those in the upper half to hi.

    Entries have seven bits: see `_lookup` for how sixteen of them are joined.
    """
    table = table_words(form)
    if form.bits < 4:
        return [
            f"and.b32 s, {word}, 0x77777777;",
            f"prmt.b32 lo, low, {table[1]:#x}, s;",
            "shr.b32 s, s, 16;",
            f"prmt.b32 hi, low, {table[1]:#x}, s;",
        ]
    return [
        f"xor.b32 s, {word}, 0x88888888;",
        f"prmt.b32 lo, low, {table[1]:#x}, {word};",
        f"prmt.b32 a, high, {table[3]:#x}, s;",
        "or.b32 lo, lo, a;",
        "shr.b32 s, s, 16;",
        f"shr.b32 x, {word}, 16;",
        f"prmt.b32 hi, low, {table[1]:#x}, x;",
        f"prmt.b32 a, high, {table[3]:#x}, s;",
        "or.b32 hi, hi, a;",
    ]


def _lookup(form: TritonLayout, word: str, out: list[str]) -> list[str]:
    bits, trellis = form.bits, form.mode == "trellis"
    table = table_words(form)
    lines = []
    if trellis:  # u of the code before, and of the one before that, at this code's place
        lines += [
            f"shf.l.wrap.b32 q, p, {word}, 4;",
            f"shf.l.wrap.b32 f, p, {word}, 8;",
            f"lop3.b32 x, {word}, q, f, {_XOR3};",
        ]
        if bits < 4:
            lines.append(f"shf.l.wrap.b32 q, p, {word}, {8 - bits};")
        lines.append(f"mov.b32 p, {word};")
    else:
        lines.append(f"mov.b32 x, {word};")
    # Selector bit 3 repeats a byte's sign: nothing, if entries have seven bits. So of a 16-entry
    # table each half is asked with the codes of the other half turned away, and both are joined.
    joined = bits == 4 and trellis
    if joined:
        lines.append("xor.b32 s, x, 0x88888888;")
    else:
        lines.append(f"and.b32 s, x, {((1 << min(bits, 3)) - 1) * 0x11111111:#x};")
    if bits == 4 and not trellis:  # eight bits: ones where the code's top bit is, as bytes
        lines += ["shr.b32 x, x, 3;", "and.b32 x, x, 0x11111111;"]
    for half in ("lo", "hi"):
        if half == "hi":
            lines += ["shr.b32 s, s, 16;"]
            lines += ["shr.b32 x, x, 16;"] if bits == 4 else []
            lines += ["shr.b32 q, q, 16;"] if trellis else []
        lines.append(f"prmt.b32 {half}, low, {table[1]:#x}, {'x' if joined else 's'};")
        if bits == 4:
            lines.append(f"prmt.b32 a, high, {table[3]:#x}, s;")
        if bits == 4 and not trellis:
            lines.append(f"prmt.b32 m, ones, ones, x; lop3.b32 {half}, a, {half}, m, {_BLEND};")
        if trellis:  # a level of odd index is minus one of even index: not of its seven bits
            lines.append("prmt.b32 m, ones, ones, q;")
            lines.append(
                f"lop3.b32 {half}, a, {half}, m, {_OR_XOR};"
                if joined
                else f"xor.b32 {half}, {half}, m;"
            )
        lines += _as_halves(half, out)
    return lines


def _wide_lookup(form: TritonLayout, word: str, fifth: str, tile: int, out: list[str]) -> list[str]:
    """Codes of five bits: the fifth one chooses between two tables of 16 entries.

    fifth: has that of tile t of the chain in bit 3 - t of every nibble.
    """
    trellis, table = form.mode == "trellis", table_words(form)
    lines = [f"shl.b32 c, {fifth}, {tile};"]
    if trellis:  # x: fifth bits of the codes; q: u of the codes before
        lines += [
            "shf.l.wrap.b32 q, p, c, 4;",
            "shf.l.wrap.b32 f, p, c, 8;",
            f"lop3.b32 x, c, q, f, {_XOR3};",
            f"mov.b32 p, c; mov.b32 f, {word};",
            f"xor.b32 s, {word}, 0x88888888;",
        ]
        halves = ("f", "s", "f", "s")  # selectors of the four halves of the tables, see `_lookup`
    else:  # eight bits: q and x, of the fourth and the fifth bits, pick zeros or ones as bytes
        lines += [
            f"and.b32 f, {word}, 0x77777777;",
            f"shr.b32 q, {word}, 3; and.b32 q, q, 0x11111111;",
            "shr.b32 x, c, 3; and.b32 x, x, 0x11111111;",
        ]
        halves = ("f", "f", "f", "f")
    for half in ("lo", "hi"):
        if half == "hi":
            lines += [f"shr.b32 {name}, {name}, 16;" for name in ("fxqs" if trellis else "fxq")]
        lines += ["prmt.b32 m, ones, ones, x;", "prmt.b32 b, ones, ones, q;"]
        asked = zip((half, "a", "d", "c"), ("low", "high", "low2", "high2"), halves, strict=True)
        lines += [
            f"prmt.b32 {to}, {first}, {table[2 * i + 1]:#x}, {selector};"
            for i, (to, first, selector) in enumerate(asked)
        ]
        if trellis:
            lines += [
                f"lop3.b32 {half}, {half}, a, m, {_OR_AND_NOT};",
                f"lop3.b32 a, d, c, m, {_OR_AND};",
                f"lop3.b32 {half}, {half}, a, b, {_OR_XOR};",
            ]
        else:
            lines += [
                f"lop3.b32 {half}, a, {half}, b, {_BLEND};",
                f"lop3.b32 a, c, d, b, {_BLEND};",
                f"lop3.b32 {half}, a, {half}, m, {_BLEND};",
            ]
        lines += _as_halves(half, out)
    return lines


def _as_halves(byte: str, out: list[str]) -> list[str]:
    """Four bytes, `lo` those of the first two dots and `hi` of the others, as fp16 1024 + byte."""
    first = 2 * (byte == "hi")
    return [
        f"mov.b32 m, 0x64646464; prmt.b32 {out[first + i]}, {byte}, m, {selector};"
        for i, selector in enumerate(("0x4140", "0x4342"))
    ]
