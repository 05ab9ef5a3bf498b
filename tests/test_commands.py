"""`regard explain` and `regard bench`: what they say, and how they say no."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from regard import Causal
from regard.cli import main
from regard.commands import bench
from regard.commands.explain import added_memory, rates
from regard.kernel import extension


def said(capsys, *arguments):
    assert main([*arguments]) == 0
    return capsys.readouterr().out


def test_explain_says_what_python_says(capsys):
    import regard

    query, key = torch.zeros(1, 8, 256, 64), torch.zeros(1, 2, 300, 64)
    A = regard.attention(
        query, key, position=regard.Alibi.of(8), mask=Causal() & regard.Window(16, 0)
    )
    told = said(
        capsys, "explain", "--shape", "1,8,256,64", "--keys", "300", "--kv-heads", "2",
        "--position", "Alibi.of(8)", "--mask", "Causal() & Window(16, 0)", "--value-width", "32",
    )  # fmt: skip
    assert told.startswith(str(A.explain(torch.zeros(1, 2, 300, 32))))
    estimate = re.search(r"estimate  (\S+) (us|ms|s) at least", told)
    assert float(estimate[1]) > 0
    assert "measured" not in told
    assert (extension.load() is not None) != ("  note " in told)


def test_explain_measures_what_it_is_asked_to(capsys):
    for extra, words in (
        (["--form", "dense"], "forward in form dense"),
        (["--train"], "forward and backward"),
    ):
        told = said(capsys, "explain", "--shape", "1,2,64,8", "--measure", *extra)
        assert re.search(rf"measured  \S+ (us|ms|s) {words} \(median of \d+, from", told)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is Linux's")
def test_memory_is_what_a_call_adds():
    code = """
import torch
from regard.commands.explain import added_memory
torch.ones(2**24).sum()  # freed before: 64 MiB that count for nothing
print(added_memory(lambda: torch.ones(2**23)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # 32 MiB, and the pages that the call touches for the first time: code, thread stacks. The
    # kernel counts pages in batches for each processor (man proc), so some are missing.
    assert 2**25 - 2**20 <= int(done.stdout) < 2**25 + 2**23
    assert added_memory(lambda: None) < 2**20


def test_rates_are_rates():
    flops, read = rates()
    assert flops > 1e8
    assert read > 1e8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mask", "Causl()"], "'Causl' is no part of regard; did you mean Causal?"),
        (["--mask", "Alibi.of(8)"], "'Alibi.of(8)' is no mask; one is 'Causal()"),
        (["--position", "Alibi.of(4)"], "has batch and head axes (4,), but the matrix has (1, 8)"),
        (["--kv-heads", "3"], "query has 8 heads and key has 3"),
        (["--form", "recurrent"], "form 'recurrent' needs a score that factorises"),
        (["--form", "fast"], "there is no form 'fast'"),
        (["--train"], "add --measure"),
        (["--score", "print(1)"], "'print' is no part of regard"),
    ],
)
def test_refusals_say_what_would_work(arguments, words, capsys):
    assert main(["explain", "--shape", "1,8,64,32", *arguments]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("regard explain: ")
    assert words in told.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain"], "the following arguments are required: --shape"),
        (["explain", "--shape", "1,8,64"], "it must be batch,heads,length,width, such as"),
        (["explain", "--shape", "1,8,64,0"], "it must be batch,heads,length,width, such as"),
        (["explain", "--shape", "1,8,64,8", "--keys", "-1"], "is not a positive whole number"),
        (["explain", "--shape", "1,8,64,8", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["bench", "--rounds", "0"], "0 is not a positive whole number"),
    ],
)
def test_wrong_options_end_with_the_usage(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "usage: regard" in told
    assert words in told


@pytest.mark.parametrize("command", ["explain", "bench"])
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"examples:\n  regard {command}" in capsys.readouterr().out


def test_examples_of_explain_are_right(capsys):
    from regard.commands.explain import EXAMPLES

    for line in EXAMPLES.splitlines():
        if "regard explain" in line and "--measure" not in line:
            words = [single or word for single, word in re.findall(r"'([^']*)'|(\S+)", line)]
            assert "form" in said(capsys, *words[1:])


def test_bench_prints_a_row_for_each_case(capsys):
    told = said(capsys, "bench", "--quick", "--rounds", "3")
    lines = told.splitlines()
    rows = [line for line in lines if any(line.startswith(c.name + " ") for c in bench.CASES)]
    assert len(rows) == len(bench.CASES)
    for line in rows:
        assert re.search(r"\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\)", line)
    assert f"torch {torch.__version__}, {torch.get_num_threads()} threads" in lines[0]


def test_bench_names_its_cases_and_reports_no_wrong_numbers(capsys):
    assert main(["bench", "--only", "nothing"]) == 1
    assert "no case has 'nothing' in its name. There are: causal; " in capsys.readouterr().err
    wrong = replace(bench.CASES[0], theirs=lambda operands: operands[2])
    with pytest.raises(bench.BenchError, match=r"causal: regard and torch differ by .* a bug"):
        bench.row(wrong, 3, quick=True)
