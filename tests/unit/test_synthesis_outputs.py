"""What a synthesis writes: shards, drop-in folders, and outputs that were interrupted."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy

from posthoc_ema import (
    ConfigError,
    NewAverage,
    PowerProfile,
    SnapshotFormatError,
    SnapshotMismatchError,
    SnapshotNotFoundError,
    SnapshotStore,
    plan_synthesis,
    synthesize,
    synthesize_to_files,
)
from posthoc_ema.synthesis import (
    Output,
    like_layout,
    sharded,
    store_recipe,
    synthesize_to_folders,
    table_tensors,
    write_outputs,
)
from posthoc_ema.synthesis.layouts import index_name, parse_size, shard_name, with_variant
from posthoc_ema.synthesis.like import map_names
from posthoc_ema.tensor_files import TensorFile, read_header, write_tensors

from .stores import TABLE, entry, make_store, make_table

# ---- names and sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("500mb", 5 * 10**8),
        ("2GiB", 2**31),
        ("1.5 kB", 1500),
        ("7", 7),
        ("3B", 3),
    ],
)
def test_sizes_are_read_as_people_write_them(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.1B", "5XB", "1e9", "5 5GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="a size is written as 5GB"):
        parse_size(text)


def test_names_are_those_that_transformers_and_diffusers_look_for():
    name = "diffusion_pytorch_model.safetensors"
    assert with_variant(name, "ema") == "diffusion_pytorch_model.ema.safetensors"
    assert shard_name(name, "ema", 2, 3) == "diffusion_pytorch_model.ema-00002-of-00003.safetensors"
    assert index_name(name, "ema") == "diffusion_pytorch_model.safetensors.index.ema.json"
    assert shard_name("model.safetensors", None, 1, 2) == "model-00001-of-00002.safetensors"
    assert index_name("model.safetensors", None) == "model.safetensors.index.json"


@pytest.mark.parametrize("variant", ["", "../x", "a.b", "a-b", "a/b"])
def test_variant_is_one_word(variant):
    with pytest.raises(ConfigError, match="--variant must be one word"):
        with_variant("model.safetensors", variant)


# ---- shards


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


def recipe_of(store, *sigma_rels, **options):
    return store_recipe(store, plan_synthesis(store, list(sigma_rels), **options))


def folders(tmp_path, count=1):
    made = [tmp_path / f"out{i}" for i in range(count)]
    for folder in made:
        folder.mkdir(exist_ok=True)
    return made


def load_folder(folder, variant=None):
    """Tensors of a model folder, as a loader finds them."""
    index = folder / index_name("model.safetensors", variant)
    if not index.exists():
        return safetensors.numpy.load_file(folder / with_variant("model.safetensors", variant))
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {name: read_bits(folder / name) for name in set(weight_map.values())}
    return {tensor: files[name][tensor] for tensor, name in weight_map.items()}


def read_bits(path):
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.header.tensors}


def test_shards_hold_what_one_file_holds(store, tmp_path):
    plan = plan_synthesis(store, [0.07, 0.03])
    synthesize_to_files(store, plan, [tmp_path / "one", tmp_path / "two"])
    layout = sharded("model.safetensors", table_tensors(TABLE), 100)
    assert len(layout.files) == 3
    made = folders(tmp_path, 2)
    synthesize_to_folders(store_recipe(store, plan), made, layout)
    for folder, single in zip(made, ["one", "two"], strict=True):
        expected, found = read_bits(tmp_path / single), load_folder(folder)
        assert set(found) == set(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


def test_shards_stay_below_the_limit_unless_one_tensor_is_larger():
    layout = sharded("model.safetensors", table_tensors(TABLE), 50)
    sizes = [[t.num_bytes for t in file.tensors] for file in layout.files]
    assert all(sum(s) <= 50 or len(s) == 1 for s in sizes)
    assert [t.name for f in layout.files for t in f.tensors] == [
        t.name for t in table_tensors(TABLE)
    ]


def test_shard_of_an_empty_tensor_alone(store, tmp_path):
    (folder,) = folders(tmp_path)
    layout = sharded("model.safetensors", table_tensors(TABLE), 1)
    assert len(layout.files) == 8
    synthesize_to_folders(recipe_of(store, 0.07), [folder], layout)
    assert load_folder(folder)["empty"].shape == (0, 3)


def test_index_says_where_each_tensor_is(store, tmp_path):
    layout = sharded("model.safetensors", table_tensors(TABLE), 100)
    (folder,) = folders(tmp_path)
    synthesize_to_folders(recipe_of(store, 0.07), [folder], layout)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in read_header(folder / file).tensors
    assert index["metadata"]["total_size"] == sum(t.num_bytes for t in table_tensors(TABLE))
    assert list(index["weight_map"]) == sorted(index["weight_map"])


def test_all_in_one_shard_is_a_plain_file(store, tmp_path):
    layout = sharded("model.safetensors", table_tensors(TABLE), 10**9)
    assert (layout.index, [f.name for f in layout.files]) == (None, ["model.safetensors"])


def test_folder_says_what_it_is(store, tmp_path):
    (folder,) = folders(tmp_path)
    plan = plan_synthesis(store, [0.07])
    layout = sharded("model.safetensors", table_tensors(TABLE), 100)
    synthesize_to_folders(store_recipe(store, plan), [folder], layout)
    record = json.loads((folder / "phema.json").read_text())
    assert (record["sigma_rel"], record["time"], record["run_id"]) == (0.07, 30, "run-1")
    assert [r["coefficient"] for r in record["inputs"]] == plan.coefficients[:, 0].tolist()
    assert [r["header_xxh3"] for r in record["inputs"]] == [r.header_checksum for r in plan.inputs]
    assert set(record["files"]) == {file.name for file in layout.files}
    text = (folder / "README.md").read_text()
    assert text.startswith("---\ntags:\n- post-hoc-ema\n---\n")
    assert "sigma_rel 0.07" in text


# ---- interruptions


def test_interrupted_shards_have_no_index_and_are_continued(store, tmp_path, monkeypatch):
    layout = sharded("model.safetensors", table_tensors(TABLE), 100)
    made = folders(tmp_path, 2)
    recipe = recipe_of(store, 0.07, 0.03)
    calls = []

    class Killed(Exception):
        pass

    def progress(done, total):
        calls.append((done, total))
        if done > 24:
            raise Killed

    with pytest.raises(Killed):
        synthesize_to_folders(recipe, made, layout, progress=progress)
    for folder in made:
        names = sorted(p.name for p in folder.iterdir())
        assert names == ["model-00001-of-00003.safetensors"]
    first = (made[0] / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    seen = []
    synthesize_to_folders(recipe, made, layout, progress=lambda *a: seen.append(a))
    assert (made[0] / "model-00001-of-00003.safetensors").stat().st_mtime_ns == first
    assert seen[0][0] > 24  # what was there counts as done
    assert seen[-1][0] == seen[-1][1]
    np.testing.assert_array_equal(
        load_folder(made[1])["conv.weight"], synthesize(store, 0.03)["conv.weight"]
    )


def test_same_request_again_writes_nothing(store, tmp_path):
    layout = sharded("model.safetensors", table_tensors(TABLE), 100)
    made = folders(tmp_path)
    recipe = recipe_of(store, 0.07)
    synthesize_to_folders(recipe, made, layout)
    before = {p.name: p.stat().st_mtime_ns for p in made[0].iterdir() if p.suffix != ".json"}
    synthesize_to_folders(recipe, made, layout)
    after = {p.name: p.stat().st_mtime_ns for p in made[0].iterdir() if p.suffix != ".json"}
    assert before == after


def test_another_request_does_not_mix_into_a_folder(store, tmp_path):
    layout = sharded("model.safetensors", table_tensors(TABLE), 100)
    made = folders(tmp_path)
    synthesize_to_folders(recipe_of(store, 0.07), made, layout)
    with pytest.raises(ConfigError, match=r"model-00001-of-00003.safetensors exists already"):
        synthesize_to_folders(recipe_of(store, 0.03), made, layout)
    wider = sharded("model.safetensors", table_tensors(TABLE), 200)
    synthesize_to_folders(recipe_of(store, 0.03), made, wider, overwrite=True)
    names = {p.name for p in made[0].glob("*.safetensors")}
    assert names == {file.name for file in wider.files}
    np.testing.assert_array_equal(
        load_folder(made[0])["conv.weight"], synthesize(store, 0.03)["conv.weight"]
    )


def test_interrupted_overwriting_leaves_no_index_to_half_a_model(store, tmp_path):
    layout = sharded("model.safetensors", table_tensors(TABLE), 100)
    made = folders(tmp_path)
    synthesize_to_folders(recipe_of(store, 0.07), made, layout)

    def stop(done, total):
        if done > 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize_to_folders(recipe_of(store, 0.03), made, layout, overwrite=True, progress=stop)
    assert not (made[0] / "model.safetensors.index.json").exists()
    assert not (made[0] / "phema.json").exists()


# ---- like a base


def base_of(folder, tensors, name="model.safetensors", config="{}", metadata=None, **others):
    """A model folder with these tensors (name -> shape)."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {n: np.zeros(shape, others.get("dtype", "float32")) for n, shape in tensors.items()}
    safetensors.numpy.save_file(arrays, folder / name, metadata or {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


PLAIN = make_table(
    entry("a.weight", (3, 2)),
    entry("b.weight", (4,)),
    entry("b.mean", (4,), averaged=False),
    entry("count", (), "int64", averaged=False),
    aliases={"head.weight": "a.weight"},
)
SHAPES = {"a.weight": (3, 2), "b.weight": (4,)}


@pytest.fixture
def plain(tmp_path):
    return make_store(tmp_path / "plain", table=PLAIN)


def test_output_like_a_base_has_its_names_dtypes_and_files(plain, tmp_path):
    base = base_of(tmp_path / "base", SHAPES, dtype="float16", metadata={"format": "pt", "x": "y"})
    (base / "tokenizer.json").write_text("[1]")
    for name in ("optimizer.pt", "pytorch_model.bin", "trainer_state.json", "README.md"):
        (base / name).write_text("no")
    layout = like_layout(base, PLAIN)
    (folder,) = folders(tmp_path)
    synthesize_to_folders(recipe_of(plain, 0.07), [folder], layout)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "phema.json", "tokenizer.json",
    ]  # fmt: skip
    header = read_header(folder / "model.safetensors")
    assert {i.name: (i.dtype, i.shape) for i in header.tensors.values()} == {
        name: ("float16", shape) for name, shape in SHAPES.items()
    }
    assert (header.metadata["format"], header.metadata["x"]) == ("pt", "y")
    found = safetensors.numpy.load_file(folder / "model.safetensors")
    expected = synthesize(plain, 0.07)
    np.testing.assert_array_equal(found["a.weight"], expected["a.weight"].astype("float16"))
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


def test_base_may_know_a_tied_tensor_by_its_other_name(plain, tmp_path):
    base = base_of(tmp_path / "base", {"head.weight": (3, 2), "b.weight": (4,)})
    (folder,) = folders(tmp_path)
    synthesize_to_folders(recipe_of(plain, 0.07), [folder], like_layout(base, PLAIN))
    found = safetensors.numpy.load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(found["head.weight"], synthesize(plain, 0.07)["a.weight"])


def test_buffers_are_written_where_the_base_has_them(plain, tmp_path):
    base = base_of(tmp_path / "base", {**SHAPES, "b.mean": (4,)}, dtype="float16")
    (folder,) = folders(tmp_path)
    synthesize_to_folders(recipe_of(plain, 0.07), [folder], like_layout(base, PLAIN))
    found = safetensors.numpy.load_file(folder / "model.safetensors")["b.mean"]
    np.testing.assert_array_equal(found, synthesize(plain, 0.07)["b.mean"].astype("float16"))


def test_shard_borders_and_index_are_those_of_the_base(plain, tmp_path):
    base = tmp_path / "base"
    base_of(base, {"b.weight": (4,)}, "model-00001-of-00002.safetensors")
    base_of(base, {"a.weight": (3, 2)}, "model-00002-of-00002.safetensors")
    index = {
        "metadata": {"total_size": 1, "total_parameters": 10},
        "weight_map": {
            "a.weight": "model-00002-of-00002.safetensors",
            "b.weight": "model-00001-of-00002.safetensors",
        },
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder,) = folders(tmp_path)
    layout = like_layout(base, PLAIN, variant="ema")
    synthesize_to_folders(recipe_of(plain, 0.07), [folder], layout)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.ema.md", "config.json", "model.ema-00001-of-00002.safetensors",
        "model.ema-00002-of-00002.safetensors", "model.safetensors.index.ema.json", "phema.ema.json",
    ]  # fmt: skip
    written = json.loads((folder / "model.safetensors.index.ema.json").read_text())
    assert written["metadata"] == {"total_size": 40, "total_parameters": 10}
    assert list(read_header(folder / "model.ema-00001-of-00002.safetensors").tensors) == [
        "b.weight"
    ]
    expected = synthesize(plain, 0.07)
    for name, values in load_folder(folder, "ema").items():
        np.testing.assert_array_equal(values, expected[name])
    (base / "model-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(SnapshotFormatError, match="model-00002"):
        like_layout(base, PLAIN)


def test_a_variant_may_lie_beside_the_base_the_rest_stays(plain, tmp_path):
    base = base_of(tmp_path / "base", SHAPES)
    (base / "README.md").write_text("mine")
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is the base itself"):
        synthesize_to_folders(recipe_of(plain, 0.07), [base], like_layout(base, PLAIN))
    synthesize_to_folders(recipe_of(plain, 0.07), [base], like_layout(base, PLAIN, variant="ema"))
    assert (base / "model.safetensors").read_bytes() == before
    assert (base / "README.md").read_text() == "mine"
    assert (base / "model.ema.safetensors").exists()
    # With both there, the plain one is the base.
    assert like_layout(base, PLAIN, variant="b").files[0].name == "model.b.safetensors"


def test_configuration_that_is_there_already_is_not_replaced(plain, tmp_path):
    base = base_of(tmp_path / "base", SHAPES)
    (folder,) = folders(tmp_path)
    (folder / "config.json").write_text("other")
    with pytest.raises(ConfigError, match=r"config.json exists already"):
        synthesize_to_folders(recipe_of(plain, 0.07), [folder], like_layout(base, PLAIN))


def test_readme_of_the_user_is_not_replaced(plain, tmp_path):
    base = base_of(tmp_path / "base", SHAPES)
    (folder,) = folders(tmp_path)
    (folder / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"README.md exists already"):
        synthesize_to_folders(recipe_of(plain, 0.07), [folder], like_layout(base, PLAIN))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**SHAPES, "c.weight": (1,)}, r"has 1 tensors that the snapshots lack: 'c.weight'"),
        ({"a.weight": (3, 2)}, r"lacks 1 tensors that were tracked and would be lost: 'b.weight'"),
        ({**SHAPES, "a.weight": (2, 3)}, r"tensor 'a.weight' has shape \(2, 3\), the tracked one"),
    ],
)
def test_base_of_another_model_is_refused_by_tensor(tmp_path, tensors, message):
    base = base_of(tmp_path / "base", tensors)
    with pytest.raises(SnapshotMismatchError, match=message):
        like_layout(base, PLAIN)


def test_base_in_whole_numbers_is_refused(tmp_path):
    base = base_of(tmp_path / "base", SHAPES, dtype="int8")
    with pytest.raises(ConfigError, match=r"is int8, in which averages cannot be written.*--dtype"):
        like_layout(base, PLAIN)
    assert like_layout(base, PLAIN, dtype="float32").files[0].tensors[0].dtype == "float32"


def test_new_shard_borders_for_a_base(tmp_path):
    base = base_of(tmp_path / "base", SHAPES, "adapter_model.safetensors", config=None)
    layout = like_layout(base, PLAIN, shard_bytes=24)
    assert [f.name for f in layout.files] == [
        "adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert layout.library == "peft"


def test_folders_without_usable_weights_are_explained(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SnapshotNotFoundError, match="holds no safetensors weights"):
        like_layout(tmp_path / "empty", PLAIN)
    with pytest.raises(SnapshotNotFoundError, match="does not exist"):
        like_layout(tmp_path / "nothing", PLAIN)
    base_of(tmp_path / "pipe" / "unet", SHAPES, "diffusion_pytorch_model.safetensors")
    base_of(tmp_path / "pipe" / "vae", SHAPES, "diffusion_pytorch_model.safetensors")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    with pytest.raises(SnapshotNotFoundError, match=r"whole pipeline.*unet, vae"):
        like_layout(tmp_path / "pipe", PLAIN)
    assert like_layout(tmp_path / "pipe" / "unet", PLAIN).library == "diffusers"
    base_of(tmp_path / "two", SHAPES, "x.safetensors")
    base_of(tmp_path / "two", SHAPES, "y.safetensors")
    with pytest.raises(SnapshotNotFoundError, match=r"several weight files.*x.safetensors"):
        like_layout(tmp_path / "two", PLAIN)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": "../x"}}',
     b'{"weight_map": {"a": 1}}', b'{"weight_map": []}', b"\xff", b"[" * 100_000],
)  # fmt: skip
def test_malformed_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(SnapshotFormatError, match="not a readable index of shards"):
        like_layout(tmp_path, PLAIN)


def test_index_that_contradicts_its_files_is_refused(tmp_path):
    base_of(tmp_path, SHAPES, "model-00001-of-00001.safetensors")
    for names in (["a.weight"], ["a.weight", "b.weight", "c"]):
        weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
        with pytest.raises(SnapshotFormatError, match=r"Save the model anew"):
            like_layout(tmp_path, PLAIN)


# ---- names


def names_of(*names, copied=()):
    return make_table(*(entry(n, (1,), averaged=n not in copied) for n in names))


@pytest.mark.parametrize(
    ("tracked", "base"),
    [
        ("module.x.weight", "x.weight"),
        ("_orig_mod.x.weight", "x.weight"),
        ("x._orig_mod.weight", "x.weight"),
        ("unet.x.weight", "x.weight"),
        ("x.weight", "transformer.x.weight"),
        ("base_model.model.x.lora_A.default.weight", "base_model.model.x.lora_A.weight"),
        ("base_model.model.x.lora_A.mine.weight", "base_model.model.x.lora_A.weight"),
        ("x.lora_embedding_A.default", "x.lora_embedding_A"),
        ("x.lora_magnitude_vector.default.weight", "x.lora_magnitude_vector"),
        ("b.classifier.modules_to_save.default.weight", "b.classifier.weight"),
        ("wrapped.base_model.x.lora_A.default.weight", "base_model.x.lora_A.weight"),
    ],
)
def test_names_are_matched_as_saving_changes_them(tmp_path, tracked, base):
    sources, lost = map_names([base], names_of(tracked), tmp_path)
    assert (sources, lost) == ({base: tracked}, ())


def test_frozen_weights_of_an_adapted_model_are_left_out(tmp_path):
    table = names_of(
        "m.x.base_layer.weight", "m.x.lora_A.default.weight", copied="m.x.base_layer.weight"
    )
    assert map_names(["m.x.lora_A.weight"], table, tmp_path)[1] == ()


def test_other_parts_of_a_model_are_left_out_and_said(tmp_path):
    table = names_of("unet.x.weight", "text.y.weight")
    assert map_names(["x.weight"], table, tmp_path) == (
        {"x.weight": "unet.x.weight"},
        ("text.y.weight",),
    )


def test_an_adapter_beside_the_wanted_one_is_not_lost_silently(tmp_path):
    table = names_of("x.lora_A.default.weight", "x.lora_A.other.weight")
    with pytest.raises(SnapshotMismatchError, match=r"would be lost: 'x.lora_A.\w+.weight'"):
        map_names(["x.lora_A.weight"], table, tmp_path)


# ---- one file as the base


def test_lora_file_keeps_its_metadata_and_gets_its_own_hash(tmp_path):
    table = names_of("lora_unet_x.lora_down.weight", "lora_unet_x.alpha")
    store = make_store(tmp_path / "store", table=table)
    metadata = {
        "ss_network_dim": "4", "modelspec.title": "t", "format": "pt",
        "sshs_model_hash": "f" * 64, "sshs_legacy_hash": "0badcafe",
    }  # fmt: skip
    path = tmp_path / "lora.safetensors"
    write_tensors(path, {n: np.zeros(1, "float32") for n in table.entries}, metadata=metadata)
    (tmp_path / "o").mkdir()
    output = Output(tmp_path / "o", like_layout(path, table), alone=True)
    write_outputs(recipe_of(store, 0.07), [output])
    written = tmp_path / "o" / "lora.safetensors"
    found = read_header(written).metadata
    data = written.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert found["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
    assert "sshs_legacy_hash" not in found
    assert (found["ss_network_dim"], found["modelspec.title"]) == ("4", "t")


# ---- overrides, times


def test_override_gives_some_tensors_another_length(store, tmp_path):
    plan = plan_synthesis(store, [0.03, 0.07], overrides=[("conv.*", 0.09)])
    paths = [tmp_path / "a", tmp_path / "b"]
    synthesize_to_files(store, plan, paths, dtype="float32")
    for path, sigma_rel in zip(paths, [0.03, 0.07], strict=True):
        found = read_bits(path)
        np.testing.assert_allclose(
            found["conv.weight"], synthesize(store, 0.09)["conv.weight"], rtol=1e-5
        )
        np.testing.assert_allclose(found["half"], synthesize(store, sigma_rel)["half"], rtol=1e-5)
    own = json.loads(read_header(paths[0]).metadata["posthoc_ema"])
    assert own["overrides"] == {"conv.*": 0.09}


def test_left_out_times_are_not_read(store, tmp_path):
    path = tmp_path / "a"
    synthesize_to_files(store, plan_synthesis(store, [0.07], exclude=[20]), [path])
    own = json.loads(read_header(path).metadata["posthoc_ema"])
    assert {row["time"] for row in own["inputs"]} == {10, 30}


def test_store_of_one_tensor_in_a_folder(tmp_path):
    """The smallest layout: no copies, one file."""
    table = make_table(entry("w", (2,)))
    with SnapshotStore.create(tmp_path / "s", clock="steps", table=table) as store:
        store.add(1, [NewAverage(PowerProfile(1, 0.1), "float16", lambda _: np.ones(2, "f4"))])
    (folder,) = folders(tmp_path)
    layout = sharded("model.safetensors", table_tensors(table), 100, "ema")
    synthesize_to_folders(recipe_of(store, 0.1), [folder], layout)
    assert load_folder(folder, "ema")["w"].tolist() == [1, 1]
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.ema.md", "model.ema.safetensors", "phema.ema.json",
    ]  # fmt: skip
