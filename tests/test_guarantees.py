"""Every method of this project holds every guarantee. The peers' columns: `python -m benchmarks.guarantees`."""

from pathlib import Path

import pytest

from tests.guarantees.columns import OURS, SCALED
from tests.guarantees.situations import SITUATIONS, verdict


@pytest.mark.parametrize("name", [*OURS, *SCALED])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_guarantee(situation: str, name: str, tmp_path: Path) -> None:
    found, why = verdict(situation, name, tmp_path)
    if found == "not run":
        pytest.skip(why)
    if found == "refused" and situation == "max_steps":
        assert "counts epochs: set max_epochs" in why
        return
    assert found == "yes", f"{found}: {why}"
