"""Made-up finished runs side by side, as `launch.py --mode=compare` puts them."""

import hashlib

import pytest
from ml_collections import ConfigDict

from configs import default
from robust_jax.app import stored
from robust_jax.app.config import to_json
from robust_jax.app.pages import compare
from robust_jax.errors import UserError
from robust_jax.files import write_json
from tests.made_up import HOSTILE, Page, make_audit, make_run

ADVICE = "train one with launch.py"


def finished(workdir, *, audit=None, measurements=None, norms=("linf", "l2"), **fields):
    """A run of the default config with these fields changed, in a folder of its own."""
    config = default.get_config()
    config.update(ConfigDict(fields))
    results = make_run(workdir, audit=audit, norms=norms)
    results |= {"config": to_json(config), "measurements": measurements or {}}
    write_json(workdir / "config.json", results["config"])
    stored.write_results(workdir, results)
    return workdir


def contents(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two seeds of an arm and a run that stands alone, compared."""
    folder = tmp_path_factory.mktemp("compared")
    long = "the_same_name_for_forty_characters_and_then_"
    folders = [
        finished(folder / "arm" / "0", audit=make_audit(steps="pass", square="fail")),
        finished(
            folder / "arm" / "1",
            seed=1,
            validation_attack={"name": "pgd", "eps": 0.15},
            measurements={long + end: {"mean": 1.25} for end in ("one", "two")},
        ),
        finished(
            folder / "alone",
            threat={"norm": "linf", "eps": 0.1},
            loss_on="clean",
            dataset=HOSTILE,
            norms=("linf",),
            measurements={long + "one": {"mean": None}},
        ),
    ]
    before = contents(folder)
    said = compare.write(folders, folder / "out")
    after = {path: sha for path, sha in contents(folder).items() if path.parts[0] != "out"}
    assert after == before  # runs are left as they were
    return compare.load(folders), said, folder / "out"


def test_runs_are_called_by_what_tells_them_apart_and_says_something(made, tmp_path):
    assert list(made[0]) == ["arm/0", "arm/1", "alone"]
    for name in ("a/b/3", "other"):
        finished(tmp_path / name)
    assert list(compare.load([tmp_path / "a/b/3", tmp_path / "other"])) == ["b/3", "other"]


def test_the_table_holds_the_numbers_of_each(made):
    compared, said, _ = made
    table = compare.table(compared)
    for name, run in compared.items():
        clean = run.results["clean"]
        assert table[name]["clean accuracy, %"] == f"{100 * clean['accuracy']:.1f}"
        for entry in run.results["attacks"]:
            if entry["name"] == "worst_case_linf":
                row = f"worst case, ℓ∞ {entry['eps']:g}, %"
                assert table[name][row] == f"{100 * entry['robust_accuracy']:.1f}"
        norm = run.results["jacobian"]["logits"]["spectral"]["mean"]
        assert table[name]["‖J‖ spectral, logits"] == f"{norm:.3g}"
    assert list(table.loc["worst case, ℓ₂ 1, %"] == "–") == [False, False, True]
    assert list(table.loc["audit"]) == ["fail", "not audited", "not audited"]
    (measured,) = [label for label in table.index if label.endswith("_one: mean")]
    assert list(table.loc[measured]) == ["–", "1.25", "–"]
    assert list(compare.audits(compared).loc["square"]) == ["fail", "–", "–"]
    assert table["arm/0"]["clean accuracy, %"] in said


def test_rows_of_the_text_are_told_apart(made):
    compared, said, _ = made
    width = said.index("arm/0")
    words = "".join(line[:width].replace(" ", "") for line in said.splitlines())
    for label in compare.table(compared).index:
        assert label.replace(" ", "") in words
    assert max(map(len, said.splitlines()[:-1])) <= 80


def test_differences_are_of_what_the_runs_were_made_with(made):
    compared, said, _ = made
    found = compare.differences(compared)
    assert {field: list(row) for field, row in found.T.items()} == {
        "dataset": ["digits", "digits", HOSTILE],
        "loss_on": ["adversarial", "adversarial", "clean"],
        "seed": ["0", "1", "0"],
        "threat.eps": ["0.15", "0.15", "0.1"],
        # One run sets it, and the others follow the threat model.
        "validation_attack.eps": ["0.15", "0.15", "0.1"],
    }
    assert all(field in said for field in found.index)


def test_an_older_config_is_compared_as_it_is(tmp_path):
    for name, eps in (("old", 0.0314), ("new", 0.03141)):  # values that differ look different
        make_run(tmp_path / name, note=eps)
        write_json(tmp_path / name / "config.json", {})
    found = compare.differences(compare.load([tmp_path / "old", tmp_path / "new"]))
    assert {field: list(row) for field, row in found.T.items()} == {"note": ["0.0314", "0.03141"]}


def test_the_page_holds_the_tables_and_figures(made):
    compared, said, out = made
    assert said.endswith(f"report: {out / 'report.html'}")
    html = (out / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "3 runs compared" in page.text
    for frame in (compare.table(compared), compare.audits(compared), compare.differences(compared)):
        for label, row in frame.T.items():
            assert label in page.text and all(value in page.text for value in row)
    assert "Audit failed" in page.text and "Not audited" in page.text
    sources = [attrs["src"] for attrs in page.all("img")]
    assert len(sources) == len(compare.figures(compared)) >= 3
    assert all(source.startswith("data:image/") for source in sources)
    assert HOSTILE not in html and not page.all("script") and not page.all("link")


def test_what_cannot_be_compared_is_refused_and_nothing_is_written(made, tmp_path, undrawn):
    out = made[2]
    one, other, empty = out.parent / "alone", out.parent / "arm" / "0", tmp_path / "empty"
    empty.mkdir()
    unfinished = finished(tmp_path / "unfinished")
    (unfinished / "results.json").unlink()
    for folders, message in (
        ([one], "two runs or more, not 1: name their folders"),
        ([one, one], "two runs or more, not 1"),
        ([one, empty], f"{empty} holds nothing and no run; {ADVICE}"),
        ([one, tmp_path], f"{tmp_path} holds other files and no run; {ADVICE}"),
        ([one, unfinished], "has no results yet; finish it"),
    ):
        with pytest.raises(UserError, match=message):
            compare.write(folders, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="results.json is a file; take another --workdir"):
        compare.write([one, other], one / "results.json")
    before = contents(other)
    with pytest.raises(UserError, match="holds a run; take another --workdir"):
        compare.write([one, other], other)
    assert contents(other) == before
    for _ in range(2):  # it overwrites its own page
        compare.write([one, other], tmp_path / "out")
    assert "2 runs compared" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
