"""`phema sample` with guides, samplers, folders of images and two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reference_trainer.data import load_dataset

QUICK = ("--steps", 3, "--seeds", "0-11")
GUIDED = ("--guide", "small", "--guide-sigma-rel", "0.2", "--guidance", 2)


@pytest.fixture(scope="module")
def guide_run(tmp_path_factory, trained_run):
    """A run without classes, smaller than `trained_run`, as classifier-free guidance wants it."""
    from phema.app import run

    folder = tmp_path_factory.mktemp("guide") / "small"
    config = json.loads((trained_run / "config.json").read_text())
    config["network"] |= {"label_dim": 0, "model_channels": 4}
    config["track"]["direct_sigma_rels"] = []
    changed = folder.parent / "config.json"
    changed.write_text(json.dumps(config))
    words = ["train", "--config", str(changed), "--set", "total_images=96", "--out", str(folder)]
    assert run(words) == 0
    return folder


@pytest.fixture
def runs(run_folder, guide_run, tmp_path):
    """tmp_path/run and tmp_path/small."""
    shutil.copytree(guide_run, tmp_path / "small")
    return run_folder


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_guidance_changes_the_images_and_weight_1_does_not(phema, runs):
    words = ("sample", "run", "--sigma-rel", "0.1", *QUICK)
    phema(*words, "--out", "plain.png").succeeded()
    phema(*words, *GUIDED, "--out", "guided.png").succeeded()
    phema(*words, *GUIDED, "--guidance-interval", "1,80", "--out", "inside.png").succeeded()
    phema(*words, *GUIDED[:-1], 1, "--out", "one.png").succeeded()
    contents = [Path(f"{name}.png").read_bytes() for name in ("plain", "guided", "inside", "one")]
    assert contents[0] == contents[3]
    assert len(set(contents)) == 3


def test_each_network_has_a_length_and_a_time_of_its_own(phema, runs):
    words = ("sample", "run", "--sigma-rel", "0.05", *QUICK, "--guide", "run", "--guidance", 2)
    phema(*words, "--guide-sigma-rel", "0.05", "--out", "same.png").succeeded()
    phema(*words, "--guide-sigma-rel", "0.2", "--out", "longer.png").succeeded()
    phema(*words, "--guide-sigma-rel", "0.05", "--guide-at", 96, "--out", "earlier.png").succeeded()
    phema("sample", "run", "--sigma-rel", "0.05", *QUICK, "--out", "plain.png").succeeded()
    same, longer, earlier, plain = (
        Path(f"{name}.png").read_bytes() for name in ("same", "longer", "earlier", "plain")
    )
    assert same == plain  # a network guided by itself
    assert len({longer, earlier, plain}) == 3


def test_two_guides_are_mixed(phema, runs):
    words = ("sample", "run", "--sigma-rel", "0.1", *QUICK, "--guide", "small", "--guide", "run")
    options = ("--guide-sigma-rel", "0.2", "--guidance", 1.5, "--guidance", 2, "--out", "mixed")
    phema(*words, *options).succeeded()
    settings = json.loads(Path("mixed/sampling.json").read_text())
    assert [guide["weight"] for guide in settings["guidance"]] == [1.5, 2.0]


def test_a_folder_is_a_data_set_and_holds_what_a_picture_shows(phema, runs):
    words = ("sample", "run", "--sigma-rel", "0.1", "--classes", *QUICK)
    assert phema(*words, "--out", "images").succeeded() == "images\n"
    phema(*words, "--columns", 12, "--out", "grid.png").succeeded()
    grid = pixels("grid.png")[::4]
    dataset = load_dataset("images")
    values, labels = dataset.read(np.arange(12))
    assert labels.tolist() == [*range(10), 0, 1]
    for i, image in enumerate(values):
        assert np.array_equal(image[0], pixels(f"images/{i:08d}.png"))
        assert np.array_equal(image[0], grid[:, i * 34 : i * 34 + 32 : 4])


def test_a_folder_is_filled_up_and_nothing_is_made_twice(phema, runs):
    words = ("sample", "run", "--sigma-rel", "0.1", "--steps", 3, "--batch-size", 4, "--out", "a")
    phema(*words, "--seeds", "0-5").succeeded()
    before = {path.name: path.stat().st_mtime_ns for path in Path("a").glob("*.png")}
    Path("a/00000003.png").unlink()
    phema(*words, "--seeds", "0-9").succeeded()
    after = {path.name: path.stat().st_mtime_ns for path in Path("a").glob("*.png")}
    assert sorted(after) == [f"{i:08d}.png" for i in range(10)]
    assert [name for name in before if before[name] != after[name]] == ["00000003.png"]
    phema(*words[:-1], "b", "--seeds", "0-9").succeeded()
    assert files("a") == files("b")
    phema(*words, "--seeds", "0-9", "--churn", 9).refused(
        "a holds images", "sampler.churn: 0.0 there"
    )
    phema(*words, "--seeds", "0-9", "--churn", 9, "--overwrite").succeeded()
    changed, old = files("a"), files("b")
    assert all(changed[name] != old[name] for name in changed if name != "dataset.json")
    assert changed["dataset.json"] == old["dataset.json"]


def test_several_lengths_fill_a_folder_each(phema, runs):
    words = ("sample", "run", "--sigma-rel", "raw,0.1", "--out", "all", *QUICK)
    phema(*words).succeeded()
    assert sorted(path.name for path in Path("all").iterdir()) == ["0.1", "raw"]
    assert load_dataset("all/raw").label_dim == load_dataset("all/0.1").label_dim


@pytest.mark.parametrize(
    "options",
    [("--sampler", "euler"), ("--churn", 20), ("--precision", "bfloat16"), ("--labels", "3")],
)
def test_options_of_sampling_change_the_images(phema, runs, options):
    words = ("sample", "run", "--sigma-rel", "0.1", *QUICK)
    phema(*words, "--out", "plain").succeeded()
    phema(*words, *options, "--out", "other").succeeded()
    assert files("plain")["00000002.png"] != files("other")["00000002.png"]
    if options[0] == "--labels":
        assert load_dataset("other").read(np.arange(12))[1].tolist() == [3] * 12


def test_two_processes_make_the_images_of_one_and_say_so_once(phema, runs, tmp_path):
    words = ("sample", "run", "--sigma-rel", "0.1", *GUIDED, "--steps", 3, "--seeds", "0-10")
    words += ("--batch-size", 3, "--churn", 5, "--device", "cpu", "--out")
    phema(*words, "alone").succeeded()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*launcher, "2", "-m", "phema", *map(str, words), "together"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=200,
    )
    assert (done.returncode, done.stdout) == (0, "together\n"), done.stderr
    assert files("alone") == files("together")


def test_a_killed_command_is_completed_by_running_it_again(phema, start, runs):
    words = ("sample", "run", "--sigma-rel", "0.1", "--steps", 6, "--batch-size", 1)
    words += ("--seeds", "0-299", "--device", "cpu", "--out")
    process = start(*words, "killed")
    deadline = time.monotonic() + 100
    while len(list(Path("killed").glob("*.png"))) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = len(list(Path("killed").glob("*.png")))
    assert 5 <= made < 60
    short = (*words[: words.index("0-299")], "0-59", *words[words.index("0-299") + 1 :])
    phema(*short, "killed").succeeded()
    phema(*short, "whole").succeeded()
    assert files("killed") == files("whole")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--guidance", "2"), "--guidance needs --guide SOURCE"),
        (("--guide", "small"), "--guide needs --guidance W"),
        (("--guide", "gone", "--guidance", "2"), "gone does not exist"),
        (
            ("--guide", "small", "--guidance", "2"),
            "--guide-sigma-rel 0.1, or --guide-sigma-rel raw",
        ),
        ((*GUIDED, "--guidance", "3"), "--guidance must be given once for all guides or once"),
        ((*GUIDED[:-1], "nan"), "the guidance weight must be a finite number"),
        ((*GUIDED, "--guidance-interval", "5,0.1"), "--guidance-interval must be two rising"),
        ((*GUIDED, "--guidance-interval", "5"), "--guidance-interval must be two rising"),
        ((*GUIDED, "--guidance-interval", "90,91"), "holds no step of this sampler"),
        ((*GUIDED[:3], "0.1,0.2", "--guidance", "2"), "--guide-sigma-rel must be one length"),
        ((*GUIDED, "--guide-at", "7"), "7"),
        (("--guide", "wide", *GUIDED[2:]), "the guide makes images of resolution 16"),
        (("--sampler", "rk4"), "method must be heun or euler, got 'rk4'"),
        (("--churn", "-1"), "churn must be a number of at least 0"),
        (("--churn-interval", "3,1"), "--churn-interval must be two rising noise levels"),
        (("--precision", "int8"), "precision must be one of float32, bfloat16, float16"),
        (("--seeds", "3-x"), "--seeds must be numbers and rising ranges"),
        (("--seeds", "9223372036854775808"), "seeds must lie in 0..2^63 - 1"),
        (("--labels", "10"), "labels must lie in 0..9, the classes of this network"),
        (("--labels", "cat"), "--labels must be numbers and rising ranges"),
        (("--vae", "folder"), "--vae decodes latents, and this network makes pixels"),
        (("--out", "run"), "run holds files that are not of `phema sample`"),
    ],
)
def test_sample_refuses_what_it_cannot_use(phema, runs, unchanged, wide_run, words, message):
    out = () if "--out" in words else ("--out", "new")
    with unchanged():
        phema("sample", "run", "--sigma-rel", "0.1", *QUICK, *words, *out).refused(message)


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory, trained_run):
    """Snapshots of a network for larger images, never trained."""
    import torch

    from posthoc_ema.torch import Tracker
    from reference_trainer.config import TrainConfig
    from reference_trainer.precond import Precond

    value = json.loads((trained_run / "config.json").read_text())
    value["network"] |= {"img_resolution": 16, "model_channels": 4, "attn_resolutions": [8]}
    config = TrainConfig.from_dict(value)
    folder = tmp_path_factory.mktemp("wide") / "wide"
    network = Precond(config.network, config.data)
    metadata = {"reference_trainer": config.to_json()}
    with Tracker(network, folder, sigma_rels=(0.1,), every=1, metadata=metadata) as tracker:
        for _ in range(3):
            with torch.no_grad():
                network.net.out_gain += 0.1
            tracker.step()
    return folder


@pytest.fixture
def wide_run(wide_store, tmp_path):
    return shutil.copytree(wide_store, tmp_path / "wide")


def test_memory_that_does_not_suffice_is_told_with_a_smaller_batch(phema, runs, monkeypatch):
    import torch

    from reference_trainer.precond import Precond

    def forward(self, x, sigma, labels=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Precond, "forward", forward)
    words = ("sample", "run", "--sigma-rel", "0.1", "--out", "a.png", "--batch-size", 64)
    phema(*words).refused("does not hold a batch of 64 images", "--batch-size 32")
    phema(*words[:-1], 1).refused("--precision bfloat16, a smaller network")


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory):
    """A run folder's weights of a network of latents, never trained, and its autoencoder."""
    import warnings

    import torch
    from safetensors.torch import save_file

    from reference_trainer.config import DataConfig, NetworkConfig, TrackConfig, TrainConfig
    from reference_trainer.precond import Precond

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import AutoencoderKL

        folder = tmp_path_factory.mktemp("latents")
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4
        ).save_pretrained(folder / "vae")
    network = NetworkConfig(
        img_resolution=8, img_channels=4, label_dim=0, model_channels=8, channel_mult=(1,),
        num_blocks=1, attn_resolutions=(),
    )  # fmt: skip
    data = DataConfig(
        name="tiny", kind="latents", mean=(1.0, 0.0, 0.5, -1.0), scale=(0.1, 0.2, 0.3, 0.4)
    )
    config = TrainConfig(
        network=network, data=data, track=TrackConfig(snapshot_every=64), total_images=64,
        checkpoint_every=64, status_every=64,
    )  # fmt: skip
    weights = Precond(network, data).state_dict()
    save_file(weights, folder / "w.safetensors", {"reference_trainer": config.to_json()})
    return folder


def test_networks_of_latents_are_decoded_by_their_autoencoder(phema, latent_run):
    words = ("sample", latent_run / "w.safetensors", "--steps", 2, "--seeds", "0-9", "--out")
    phema(*words, "a").refused("this network makes latents", "--vae FOLDER or NAME")
    phema(*words, "a", "--vae", "gone").refused("autoencoder 'gone' cannot be loaded")
    phema(*words, "a", "--vae", latent_run / "vae", "--batch-size", 10).succeeded()
    assert pixels("a/00000009.png").shape == (8 * 2, 8 * 2, 3)
    phema(*words, "b", "--vae", latent_run / "vae", "--input-range", "-1..1").succeeded()
    assert files("a")["00000009.png"] != files("b")["00000009.png"]
    bad = ("--vae", latent_run / "vae", "--input-range", "0..2")
    phema(*words, "c", *bad).refused("input range must be one of 0..1, -1..1")
