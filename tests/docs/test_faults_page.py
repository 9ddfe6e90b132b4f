"""The tests that the table of faults names exist."""

import pathlib
import re

TESTS = pathlib.Path(__file__).parents[1]


def test_every_fault_has_tests_that_exist():
    rows = re.findall(r"^\| (\d*) ?\| (.+?) \| (.+) \|$", (TESTS / "campaigns" / "README.md").read_text("utf-8"), re.M)
    rows = [row for row in rows if ".py" in row[2]]
    assert [row[0] for row in rows][:26] == [str(number) for number in range(1, 27)] and len(rows) > 26
    for number, fault, tests in rows:
        names = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", tests)
        assert names, fault
        for file, name in names:
            assert f"\ndef {name}(" in (TESTS / file).read_text("utf-8") if name else (TESTS / file).is_file(), (
                number, file, name)
