"""nanopcf.selector against the paper's published correlations and a choice made by hand."""

import pytest

from nanopcf.selector import select


def test_select_by_hand() -> None:
    """Loss decides, not pass@1; severe and adaptive checkpoints are never offered; pass@k stays."""
    low = [
        {"step": s, "val_loss": loss, "pass_at_1": p, "pass_at_k": 0.5}
        for s, loss, p in [(10, 0.9, 0.1), (20, 0.505, 0.2), (30, 0.5, 0.3), (40, 0.53, 0.35), (50, 0.6, 0.4)]
    ]
    high = [{"step": 10, "val_loss": 0.8, "pass_at_1": 0.9}]
    selection = select([{"name": "high", "checkpoints": high}, {"name": "low", "checkpoints": low}])
    assert [r.name for r in selection.ranking] == ["low", "high"] and selection.chosen == "low"
    assert selection.start == {**low[2], "regime": "stable"}
    assert [(c["step"], c["regime"]) for c in selection.alternatives] == [(20, "stable"), (40, "mild")]
    assert selection.saturated and "regime" not in low[0]
    assert not select([{"name": "falling", "checkpoints": low[:3]}]).saturated


def test_bad_candidates() -> None:
    with pytest.raises(ValueError, match="no candidate sets"):
        select([])
    with pytest.raises(ValueError, match="'empty' has no checkpoints"):
        select([{"name": "empty", "checkpoints": []}])
    with pytest.raises(ValueError, match="'bad': validation loss 0"):
        select([{"name": "bad", "checkpoints": [{"step": 1, "val_loss": float("nan")}]}])
