"""`phema demo` from end to end, with a run that takes seconds instead of minutes."""

import dataclasses

import pytest
from PIL import Image

from phema.app import run
from phema.commands import demo
from posthoc_ema.sweep import read_results
from reference_trainer import presets


@pytest.fixture
def small(monkeypatch):
    config = presets.digits_xs()
    config = dataclasses.replace(
        config,
        network=dataclasses.replace(config.network, model_channels=8),
        track=dataclasses.replace(config.track, snapshot_every=64),
        total_images=2048,
        checkpoint_every=1024,
        status_every=1024,
    )
    monkeypatch.setitem(presets.PRESETS, "digits-xs", lambda: config)
    monkeypatch.setattr(demo, "NUM_IMAGES", 40)
    monkeypatch.setattr(demo, "SAMPLER_STEPS", 2)


def test_demo_makes_its_page_and_every_command_on_it_was_run(small, tmp_path, capfd):
    out = tmp_path / "demo"
    assert run(["demo", "--out", str(out)]) == 0
    printed, errors = capfd.readouterr()
    assert errors == ""
    assert "agrees with the directly tracked one to" in printed
    page = (out / "README.md").read_text()
    for picture in ("curve.png", "samples.png", "profiles.png"):
        with Image.open(out / picture) as image:
            assert image.width > 400
    for line in page.split("```bash\n")[1].split("\n```")[0].splitlines():
        assert f"$ {line}\n" in printed
    result = read_results(out / "sweep")
    assert len(result.averaged) >= 9
    assert result.raw is not None
    assert demo.agreement(out / "run", demo.DIRECT) < 1e-3

    assert run(["demo", "--out", str(out)]) == 0  # again: nothing is trained or measured anew
    assert "nothing to do" in capfd.readouterr().out
    assert read_results(out / "sweep") == result
