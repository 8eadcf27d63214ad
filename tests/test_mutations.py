"""The edits of mutations.py are edits of today's source."""

import pytest
from mutations import EDITS, ROOT


@pytest.mark.parametrize("file, old, new, tests", EDITS)
def test_the_text_of_every_edit_is_in_the_source_once(file, old, new, tests):
    assert (ROOT / "src" / "gradshield" / file).read_text(encoding="utf-8").count(old) == 1
    assert old != new and (ROOT / tests[0]).is_file()
