"""The benchmark of draft models: both sides write the same tokens."""

import pytest

from benchmarks.cpu import drafts


@pytest.mark.long
def test_both_sides_write_the_same_tokens_and_a_second_run_reuses_the_models(tmp_path):
    text = " ".join(f"The king {verb} his men that night, and {count} of them {verb} home." for count in range(400)
                    for verb in ("led", "saw", "called", "sent"))
    (tmp_path / "text.txt").write_text(text)
    workdir = str(tmp_path / "runs")
    rows = drafts.draft(str(tmp_path / "text.txt"), 1, workdir, tiny=True)
    assert [(row["temperature"], row["prompts together"]) for row in rows] == [
        ("0.0", "1"), ("0.0", "4"), ("0.8", "1"), ("0.8", "4")]
    assert all(row["equal tokens"] == "True" and 0 <= row["acceptance rate"] <= 1 for row in rows)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoints/*/manifest.json")}
    assert len(files) == 2
    again = drafts.draft(str(tmp_path / "text.txt"), 1, workdir, tiny=True)
    assert [row["acceptance rate"] for row in again] == [row["acceptance rate"] for row in rows]
    assert files == {path: path.stat().st_mtime_ns for path in files}
