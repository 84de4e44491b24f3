"""Which command is meant, and what is said where none is."""

import pytest

from dit_jax import commands
from dit_jax.buckets import BucketError


@pytest.fixture
def started(monkeypatch):
    """The commands that would have run: (name, program, arguments)."""
    found = []
    monkeypatch.setattr(commands, "run", lambda *call: found.append(call) or 0)
    return found


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_command_gets_the_rest_of_the_line(started, name):
    assert commands.main([name, "--config", "digits", "train"]) == 0
    assert started == [(name, f"dit-jax {name}", ["--config", "digits", "train"])]


@pytest.mark.parametrize(
    ("args", "found"), [([], "no command is given"), (["paint", "x"], "'paint' is no command")]
)
def test_what_is_no_command_is_one_sentence(started, capsys, args, found):
    assert commands.main(args) == 2
    said = capsys.readouterr().err
    assert said == f"dit-jax: {found}; expected train, sample, prepare, evaluate, convert or --help\n"
    assert not started


def test_help_names_every_command(started, capsys):
    assert commands.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in commands.COMMANDS)


def test_help_of_a_command_names_it_as_the_user_did(capsys):
    from dit_jax.commands import convert, evaluate, prepare, sample, train

    for module in (train, sample, prepare, evaluate, convert):
        name = module.__name__.rpartition(".")[2]
        with pytest.raises(SystemExit) as ended:
            module.main(f"dit-jax {name}", ["--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: dit-jax {name} [-h]")


def test_an_option_without_a_value_names_the_command(capsys):
    from dit_jax.commands import train

    with pytest.raises(SystemExit) as ended:
        train.main("dit-jax train", ["--config"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(
        "dit-jax train: error: argument --config: expected one argument\n"
    )


def test_what_a_store_refuses_is_one_sentence(monkeypatch, capsys):
    from dit_jax.commands import convert

    def refused(*_):
        raise BucketError("gs://b/x: the store refuses or does not answer (HTTP 403)")

    monkeypatch.setattr(convert, "main", refused)
    for name in ("leave_on_signals", "watch"):
        monkeypatch.setattr(commands.signals, name, lambda *_: None)
    assert commands.run("convert", "convert.py", []) == 1
    assert (
        capsys.readouterr().err == "convert.py: gs://b/x: the store refuses or does not answer (HTTP 403)\n"
    )
