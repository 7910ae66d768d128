"""The compare command: wiring beside ``evaluate``, tables, files, warnings, and one line for what is wrong."""

import csv
import json
from pathlib import Path

import pytest

from evaluation_results import make_result, write_images
from onestepsr.cli.main import main
from onestepsr.evaluate.result import Files, write_result

NAMES = [f"p{number}" for number in range(8)]
FIRST = {name: 20.0 + number for number, name in enumerate(NAMES)}
SECOND = {name: value + 0.5 + 0.01 * number for number, (name, value) in enumerate(FIRST.items())}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``first.json`` and ``second.json`` in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    write_result(Path("first.json"), make_result("bicubic", FIRST))
    write_result(Path("second.json"), make_result("d3sr-tiny", SECOND))
    return tmp_path


def run(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "compare", *arguments])
    assert caught.value.code == code


def test_means_and_differences(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("first.json", "second.json")
    out, err = capsys.readouterr()
    assert err == ""
    assert "23.50 ± 2.05" in out
    assert "24.04 ± 2.07" in out
    assert "better" in out
    assert "8/0/0" in out


def test_files(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("first.json", "second.json", "--json", "c.json", "--csv", "c.csv", "--markdown", "c.md", "--latex", "c.tex")
    content = json.loads(Path("c.json").read_text())
    assert [method["label"] for method in content["methods"]] == ["bicubic", "d3sr-tiny"]
    (difference,) = content["differences"]
    assert difference["verdict"] == "better"
    assert difference["p_wilcoxon"] == pytest.approx(2 / 2**8)
    assert content["warnings"] == []
    lines = list(csv.reader(Path("c.csv").read_text().splitlines()))
    assert len(lines) == 1 + 2 * len(NAMES)
    assert lines[1] == ["bicubic", "p0", "20.0"]
    assert "| d3sr-tiny | **24.04 ± 2.07** | 8 |" in Path("c.md").read_text()
    assert r"d3sr-tiny & \textbf{24.04 $\pm$ 2.07} & 8 \\" in Path("c.tex").read_text()
    assert list(results.glob(".*")) == []


def test_other_protocols_and_images_are_warned_of(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = {name: SECOND[name] for name in NAMES[1:]}
    write_result(Path("other.json"), make_result("other", part, protocol="d3sr"))
    run("first.json", "other.json")
    out, err = capsys.readouterr()
    assert "warning: bicubic and other: protocol 'osediff' against 'd3sr'\n" in err
    assert "only bicubic has the images p0; they are left out" in err
    assert "24.00 ± " in out


def test_published_numbers_stand_beside(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("first.json", "--beside", "osediff/realsr", "--markdown", "c.md")
    out, _ = capsys.readouterr()
    assert "OSEDiff-1" in out
    assert "† bicubic: 8 images; RealSR has 100" in out
    assert "| OSEDiff-1 | 25.15 | 0.7341 |" in Path("c.md").read_text()


def test_report(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(results, NAMES)
    for number, (name, values) in enumerate({"first": FIRST, "second": SECOND}.items()):
        folders = Files(lr=str(results / "lr"), sr=str(results / f"sr{number}"), hr=str(results / "hr"))
        write_result(Path(f"{name}.json"), make_result(name, values, folders=folders))
    run("first.json", "second.json", "--report", "made/report")
    assert "report: made/report/index.html" in capsys.readouterr().err
    assert len(list(Path("made/report/images").iterdir())) == 4 * len(NAMES)
    page = Path("made/report/index.html").read_text(encoding="utf-8")
    assert "Evaluation of first and second" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.json"], "absent.json: cannot be read (No such file or directory)"),
        (["bad.json"], "bad.json: not valid JSON"),
        (["first.json", "./first.json"], "first.json: given twice"),
        (["first.json", "--beside", "realrs"], "no published numbers on 'realrs': did you mean 'realsr'?"),
        (["first.json", "--csv", "no/c.csv"], "--csv no/c.csv: the folder no does not exist"),
        (["first.json", "--json", "."], "--json .: is a folder, expected a file"),
        (["first.json", "--report", "first.json"], "--report first.json: is a file, expected a folder"),
        (["first.json", "--report", "page"], "is not a report of this command"),
        (["first.json", "--wrong"], "No such option: --wrong"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], message: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.json").write_text("{")
    Path("page").mkdir()
    Path("page/index.html").write_text("mine")
    run(*arguments, code=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_mean_beyond_all_measure_is_one_line(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(Path("second.json").read_text())
    Path("second.json").write_text(json.dumps(content | {"mean": {"psnr": 10**400}}))
    run("first.json", "second.json", code=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: second.json: mean.psnr is 1000")
    assert err.count("\n") == 1


def test_files_are_written_where_no_published_table_fits(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("first.json", "--beside", "realset65", "--csv", "c.csv", "--markdown", "c.md", code=2)
    assert "no metric of these results is among those published on 'realset65'" in capsys.readouterr().err
    assert Path("c.csv").is_file()
    assert "bicubic" in Path("c.md").read_text()


def test_help_is_that_of_the_right_command(capsys: pytest.CaptureFixture[str]) -> None:
    run("--help")
    assert "evaluate compare [OPTIONS]" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    out = capsys.readouterr().out
    assert "evaluate [OPTIONS]" in out
    assert "evaluate compare [OPTIONS]" not in out


def test_a_folder_called_compare_can_still_be_measured(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(results, ["a"], methods=1)
    Path("sr0").rename("compare")
    with pytest.raises(SystemExit):
        main(["evaluate", "./compare", "--metrics", "grid"])
    assert "grid" in capsys.readouterr().out
