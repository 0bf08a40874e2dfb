"""Writes docs/cli.md, the reference of the command `precalib`, from the command line itself.

    python docs/make_cli.py           # write it
    python docs/make_cli.py --check   # exit code 1 if it is not current

It needs the package to be importable.
"""

import enum
import inspect
import sys
import types
import typing
from pathlib import Path

import typer
from typer.models import ArgumentInfo, CommandInfo, OptionInfo

from offline_quantize.cli.main import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

<!-- Written by docs/make_cli.py; run it again after a change of the command line. -->

"""
TERMS = """Effective bits are all stored bytes of a weight, in bits, per weight. "Kept" means left
unquantized. The [glossary](architecture.md#glossary) explains
the other terms.

"""
EXIT_CODES = """## Exit codes

| code | meaning |
|--:|---|
| 0 | done |
| 1 | an error, described in one sentence; or `verify` found a fault |
| 2 | wrong usage of the command line |
| 130 | interrupted |
"""
KINDS = {str: "TEXT", int: "INTEGER", float: "FLOAT", Path: "PATH"}


class Parameter(typing.NamedTuple):
    """An argument or option of a command, as it is shown."""

    usage: str
    name: str
    help: str
    default: str
    is_option: bool


def page(application: typer.Typer) -> str:
    """The whole page as Markdown."""
    commands = application.registered_commands
    intro = f"{application.info.help}\n\nRun `precalib COMMAND --help` for the same text.\n\n"
    intro += TERMS
    names = "".join(f"- [`precalib {_name(c)}`](#precalib-{_name(c)})\n" for c in commands)
    return HEAD + intro + names + "\n" + "".join(map(_section, commands)) + EXIT_CODES


def _section(command: CommandInfo) -> str:
    parameters = _parameters(command)
    usage = " ".join(["precalib", _name(command), *(p.usage for p in parameters if p.usage)])
    options = [p for p in parameters if p.is_option]
    if options:
        usage += " [OPTIONS]"
    text = f"## `precalib {_name(command)}`\n\n{inspect.getdoc(command.callback)}\n\n"
    text += f"```text\n{usage}\n```\n\n"
    if arguments := [p for p in parameters if not p.is_option]:
        text += "| argument | meaning |\n|---|---|\n"
        text += "".join(f"| `{p.name}` | {p.help} |\n" for p in arguments) + "\n"
    if options:
        text += "| option | default | meaning |\n|---|---|---|\n"
        text += "".join(f"| `{p.name}` | {p.default} | {p.help} |\n" for p in options) + "\n"
    return text


def _name(command: CommandInfo) -> str:
    assert command.callback is not None
    return command.name or command.callback.__name__.replace("_", "-")


def _parameters(command: CommandInfo) -> list[Parameter]:
    assert command.callback is not None
    hints = typing.get_type_hints(command.callback, include_extras=True)
    signature = inspect.signature(command.callback)
    return [_parameter(name, hints[name], p.default) for name, p in signature.parameters.items()]


def _parameter(name: str, hint: typing.Any, default: typing.Any) -> Parameter:
    annotated, info = typing.get_args(hint)
    help_text = (info.help or "").replace("|", r"\|")
    if isinstance(info, ArgumentInfo):
        shown = name.upper()
        return Parameter(shown, shown, help_text, "", False)
    assert isinstance(info, OptionInfo)
    # inside Annotated, typer takes the first name of an option for its default
    named = info.default if isinstance(info.default, str) else None
    flag = next(iter(info.param_decls or ()), named or "--" + name.replace("_", "-"))
    kind, repeatable = _kind(annotated)
    required = default is inspect.Parameter.empty
    if kind is bool:
        return Parameter("", flag, help_text, "off", True)
    metavar = info.metavar.replace("|", r"\|") if info.metavar else _kind_name(kind)
    shown = f"{flag} {metavar}"
    help_text += " May be given several times." if repeatable and "repeat" not in help_text else ""
    usage = shown if required else ""
    return Parameter(usage, shown, help_text, "required" if required else _default(default), True)


def _kind(annotated: typing.Any) -> tuple[typing.Any, bool]:
    """The type of one value, and whether the option may be repeated."""
    if isinstance(annotated, types.UnionType) or typing.get_origin(annotated) is typing.Union:
        annotated = next(a for a in typing.get_args(annotated) if a is not types.NoneType)
    if typing.get_origin(annotated) is list:
        return typing.get_args(annotated)[0], True
    return annotated, False


def _kind_name(kind: typing.Any) -> str:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "|".join(member.value for member in kind).replace("|", r"\|")
    return KINDS[kind]


def _default(value: typing.Any) -> str:
    return "none" if value is None else f"`{getattr(value, 'value', value)}`"


def main() -> None:
    """Write the page, or compare it."""
    text = page(app)
    if sys.argv[1:] == ["--check"]:
        if not PAGE.exists() or PAGE.read_text() != text:
            sys.exit("docs/cli.md is not current; run: python docs/make_cli.py")
    else:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
