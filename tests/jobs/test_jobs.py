"""What long work needs: progress that can be seen or not, folders that a stopped run continues in."""

import io

import pytest
from rich.console import Console

from writesae.jobs.disk import read_json, remove_halves, write_whole
from writesae.jobs.progress import Bars, track
from writesae.jobs.resumable import Kept, check_same, differences


def seen(run) -> str:
    console = Console(record=True, force_terminal=True, width=80, file=io.StringIO())
    run(console)
    return console.export_text()


def test_bars_show_what_is_done():
    def run(console):
        with Bars(console) as bars:
            reading, nothing, unknown = bars.add("reading", 5), bars.add("nothing", 0), bars.add("looking")
            reading(2)
            reading.advance(3)
            unknown(7, "found")
            nothing.advance()

    found = seen(run)
    assert "reading" in found and "5/5" in found and "found" in found and "7/?" in found
    assert "nothing" not in found, "no work, no line"


def test_bars_are_on_the_error_output_or_nowhere(capsys):
    for show in (True, False, None):
        assert list(track(iter("abc"), "spelling", show, total=3)) == ["a", "b", "c"]
        out, err = capsys.readouterr()
        assert out == "" and ("spelling" in err) == (show is True)
    assert "3/3" in seen(lambda console: list(track(range(3), "counting", console)))


IDENTITY = {"format": "notes 1", "settings": "abc"}


def test_files_of_the_same_work_are_taken(tmp_path):
    kept = Kept(tmp_path, IDENTITY)
    kept.write("atoms/3.json", {"found": [1, 2]})
    assert Kept(tmp_path, dict(IDENTITY)).read("atoms/3.json") == {"found": [1, 2]}
    assert read_json(tmp_path / "atoms/3.json") == IDENTITY | {"found": [1, 2]}
    assert kept.read("atoms/4.json") is None
    assert Kept(tmp_path, IDENTITY | {"settings": "abd"}).read("atoms/3.json") is None, "of other work"
    assert Kept(tmp_path, IDENTITY | {"seed": 0}).read("atoms/3.json") is None
    for damaged in (b"", b"[]", b"3", b'{"format": "notes 1"', b"\xff"):
        (tmp_path / "atoms/3.json").write_bytes(damaged)
        assert kept.read("atoms/3.json") is None
    nowhere = Kept(None, IDENTITY)
    nowhere.write("x.json", {})
    assert nowhere.read("x.json") is None


def test_a_folder_of_other_work_is_refused_with_what_differs(tmp_path):
    there = {"context": 24, "dtype": "float16", "old": 1}
    check_same(tmp_path, there, {"context": 24, "dtype": "float16"})
    with pytest.raises(ValueError, match=r"begun otherwise: context 24 there, 12 now; seed None there, 0 now\. Give"):
        check_same(tmp_path, there, {"context": 12, "dtype": "float16", "seed": 0})
    assert differences({}, {"seed": None}) == ["seed"], "missing is not the same as None"


def test_halves_of_killed_runs_are_removed_and_nothing_else(tmp_path):
    write_whole(tmp_path / "part-1.txt", b"whole")
    for name in (".part-2.txt.4711.tmp", ".other.txt.4711.tmp"):
        (tmp_path / name).write_bytes(b"ha")
    remove_halves(tmp_path, "part-*.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.txt.4711.tmp", "part-1.txt"]
