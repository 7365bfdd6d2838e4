"""Checkpoint files: every format round-trips bit for bit, invalid files are rejected, writes are atomic."""

import collections
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from deco_kernels import model
from deco_kernels.model import checkpoint_file
from tests.random_models import random_model

MODELS = ["deco-tiny", "dit-tiny", "deco-text-tiny"]


def same_bits(actual, expected):
    """Equal names, dtypes, shapes and bit patterns, NaN included."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        other = actual[name]
        assert other.dtype == tensor.dtype and other.shape == tensor.shape, name
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        assert torch.equal(other.contiguous().view(bits), tensor.contiguous().view(bits)), name


def published_file(path: Path, raw=None, averaged=None, **entries) -> dict[str, torch.Tensor]:
    """Writes a published training file with raw and averaged weights and other entries; returns its state_dict."""
    raw = random_model(seed=1).to(torch.bfloat16) if raw is None else raw
    averaged = random_model(seed=2) if averaged is None else averaged
    head = {f"diffusion_trainer.proj.0.{i}.weight": torch.randn(3, 3) for i in (0, 2, 4)}
    state = {**model.to_published(raw, "denoiser."), **model.to_published(averaged, "ema_denoiser."), **head}
    torch.save({"epoch": 3, "optimizer_states": [{}], "state_dict": state, **entries}, path)
    return state


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", ["deco_kernels", "published"])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("name", MODELS)
def test_every_form_round_trips_bit_for_bit(tmp_path, name, ending, names, dtype):
    net = random_model(name).to(dtype)
    with torch.no_grad():
        next(net.parameters()).view(-1)[:4] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-40])
    path = tmp_path / f"model.{ending}"
    model.save_model(net, path, names=names)
    assert os.listdir(tmp_path) == [path.name]
    again = model.load_model(path)
    assert type(again) is type(net)
    same_bits(again.state_dict(), net.state_dict())
    other = tmp_path / ("other.ckpt" if ending == "safetensors" else "other.safetensors")
    model.save_model(again, other, names="published" if names == "deco_kernels" else "deco_kernels")
    same_bits(model.load_model(other).state_dict(), net.state_dict())
    saved = sum(p.numel() * p.element_size() for p in net.parameters())
    assert saved < path.stat().st_size < saved + 200_000


def test_own_form_keeps_what_shapes_do_not_tell(tmp_path):
    net = random_model(save_memory=True, backend="reference", decoder_patch=4)
    for path in (tmp_path / "model.safetensors", tmp_path / "model.pt"):
        model.save_model(net, path, weights="raw")
        checkpoint = model.read_checkpoint(path)
        assert checkpoint.model().config == net.config
        assert checkpoint.names == "deco_kernels" and checkpoint.weights == "raw"


def test_published_files_hold_published_names(tmp_path):
    net = random_model()
    model.save_model(net, tmp_path / "a.ckpt", names="published")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert list(content) == ["state_dict"]
    same_bits(content["state_dict"], model.to_published(net, "ema_denoiser."))
    model.save_model(net, tmp_path / "b.ckpt", names="published", weights="raw")
    assert model.read_checkpoint(tmp_path / "b.ckpt").tensors.keys() == model.to_published(net, "denoiser.").keys()
    model.save_model(net, tmp_path / "c.safetensors", names="published", weights="raw")
    checkpoint = model.read_checkpoint(tmp_path / "c.safetensors")
    same_bits(checkpoint.tensors, model.to_published(net))
    assert list(checkpoint.sets) == ["raw"]


def test_averaged_or_raw_weights(tmp_path):
    path = tmp_path / "training.ckpt"
    raw, averaged = random_model(seed=1).to(torch.bfloat16), random_model(seed=2)
    published_file(path, raw, averaged)
    for weights, expected in ((None, averaged), ("ema", averaged), ("raw", raw)):
        same_bits(model.load_model(path, weights=weights).state_dict(), expected.state_dict())
    model.save_model(raw, tmp_path / "raw.ckpt", names="published", weights="raw")
    same_bits(model.load_model(tmp_path / "raw.ckpt").state_dict(), raw.state_dict())
    with pytest.raises(ValueError, match="raw.ckpt: expected ema weights, found raw weights only"):
        model.load_model(tmp_path / "raw.ckpt", weights="ema")
    with pytest.raises(ValueError, match=r"weights: expected one of \['ema', 'raw'\] or None, got 'both'"):
        model.load_model(path, weights="both")


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_files_are_memory_mapped(tmp_path, ending):
    path = tmp_path / f"model.{ending}"
    model.save_model(random_model(), path)
    checkpoint = model.read_checkpoint(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    net = checkpoint.model()
    del checkpoint
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_summary(tmp_path):
    path = tmp_path / "training.ckpt"
    published_file(path)
    count = sum(parameter.numel() for parameter in random_model().parameters())
    text = model.read_checkpoint(path).summary()
    tensors = len(model.to_published(random_model()))
    assert text.startswith(f"{path}: torch file, {path.stat().st_size:,} bytes, published names")
    assert f"raw weights: {tensors} tensors, {count:,} values, bfloat16" in text
    assert f"ema weights: {tensors} tensors, {count:,} values, float32" in text
    assert "alignment head: 3 tensors, 27 values, float32" in text
    assert "not read: epoch (int), optimizer_states (list)" in text
    assert text.count("model: DeCo(width=24, depth=2, heads=2, num_classes=10") == 1


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_another_size_lists_every_difference(tmp_path):
    path = tmp_path / "odd.ckpt"
    state = model.to_published(random_model())
    state["blocks.1.attn.proj.bias"] = torch.zeros(7)
    del state["blocks.0.norm1.weight"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError) as caught:
        model.load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: state_dict: does not fit a DeCo") and len(message.splitlines()) == 3
    assert "missing: blocks.0.norm1.weight [24]" in message
    assert "misshapen: blocks.1.attn.proj.bias, expected [24], got [7]" in message


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_own_form_of_another_size_lists_every_difference(tmp_path, ending, monkeypatch):
    """Tensors that do not match the arguments."""
    path, net = tmp_path / f"model.{ending}", random_model()
    net.config = {**net.config, "num_classes": 12, "depth": 1}
    model.save_model(net, path)
    with pytest.raises(ValueError) as caught:
        model.load_model(path)
    message = str(caught.value)
    assert "misshapen: trunk.label_table.weight, expected [13, 24], got [11, 24]" in message
    assert "extra: trunk.blocks.1.norm1.weight [24]" in message and message.startswith(str(path))


def test_other_models_and_contents(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"layer1.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"other.ckpt: state_dict: expected a published DeCo .* got layer1.weight"):
        model.load_model(path)
    torch.save({"state_dict": {"step": 3}}, path)
    with pytest.raises(TypeError, match="other.ckpt: .*expected dense tensors of .*, got 'step'"):
        model.load_model(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="expected a dictionary with a state_dict, got list"):
        model.load_model(path)
    with pytest.raises(TypeError, match="expected DeCo, DeCoTextToImage or DiT, got Linear"):
        model.save_model(torch.nn.Linear(2, 2), tmp_path / "linear.ckpt")
    assert os.listdir(tmp_path) == ["other.ckpt"]


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_truncated_files(tmp_path, ending):
    whole, path = tmp_path / f"whole.{ending}", tmp_path / f"cut.{ending}"
    model.save_model(random_model(), whole)
    data = whole.read_bytes()
    for length in (0, 3, 20, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        expected = "truncated or damaged" if length >= 20 else "expected a torch archive .* or a safetensors file"
        with pytest.raises(ValueError, match=expected) as caught:
            model.load_model(path)
        assert str(path) in str(caught.value)


def test_paths_without_a_file(tmp_path, make_fifo):
    make_fifo(tmp_path / "pipe.ckpt")
    for name, error, kind in (
        ("absent.ckpt", FileNotFoundError, "nothing"),
        ("pipe.ckpt/below.ckpt", FileNotFoundError, "nothing"),
        ("", IsADirectoryError, "a folder"),
        ("pipe.ckpt", OSError, "a FIFO"),
    ):
        with pytest.raises(error, match=f"{tmp_path / name}: expected a checkpoint file, found {kind}; check the path"):
            model.load_model(tmp_path / name)


def test_damaged_archives(tmp_path):
    """Without its pickle, with another pickle, with a record missing."""
    whole, path = tmp_path / "whole.ckpt", tmp_path / "damaged.ckpt"
    model.save_model(random_model(), whole)

    def rewritten(change):
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
            for info in old.infolist():
                data = change(info.filename, old.read(info))
                if data is not None:
                    new.writestr(info.filename, data)

    changes = {
        "no pickle": lambda name, data: None if name.endswith("data.pkl") else data,
        "cut pickle": lambda name, data: data[:100] if name.endswith("data.pkl") else data,
        "no record": lambda name, data: None if name.endswith("/data/3") else data,
    }
    for change in changes.values():
        rewritten(change)
        with pytest.raises(ValueError, match="damaged"):
            model.load_model(path)


class Malicious:
    def __reduce__(self):
        return (os.mkdir, (self.victim,))


class Options:
    """Represents a class of a training program."""


def test_code_in_a_file_is_not_run(tmp_path):
    path, victim = tmp_path / "code.ckpt", tmp_path / "victim"
    Malicious.victim = str(victim)
    published_file(path, callbacks=Malicious(), options=Options(), seen=collections.UserDict())
    with pytest.raises(ValueError) as caught:
        model.load_model(path)
    message = str(caught.value)
    for name in ("posix.mkdir", f"{__name__}.Options", "collections.UserDict"):
        assert name in message
    assert "weights_only=False" not in message and not victim.exists()
    allowed = ["posix.mkdir", f"{__name__}.Options", "collections.UserDict"]
    with pytest.raises(ValueError, match="GLOBAL posix.mkdir whose module posix is blocked"):
        model.load_model(path, allow_globals=allowed)
    assert not victim.exists()


def test_a_global_is_admitted_by_name(tmp_path):
    path, name = tmp_path / "options.ckpt", f"{__name__}.Options"
    averaged = random_model(seed=2)
    published_file(path, averaged=averaged, options=Options())
    with pytest.raises(ValueError, match=rf"refers to {name}, .*--allow-global {name}"):
        model.load_model(path)
    same_bits(model.load_model(path, allow_globals=[name]).state_dict(), averaged.state_dict())
    with pytest.raises(ValueError, match="refers to"):
        model.load_model(path)
    for unknown in ("no.such.module.Class", f"{__name__}.Absent", "plain"):
        with pytest.raises(ImportError, match=f"allow_globals: {unknown} cannot be imported"):
            model.load_model(path, allow_globals=[unknown])


@pytest.mark.parametrize(
    "said",
    [
        {"names": "deco_kernels"},
        {"names": "deco_kernels", "model": "DeCo", "config": "{"},
        {"names": "deco_kernels", "model": "DeCo", "config": "[]"},
        {"names": "deco_kernels", "model": "Linear", "config": "{}"},
        {
            "names": "deco_kernels",
            "model": "DeCo",
            "config": json.dumps({"width": 10**9, "depth": 1, "heads": 2, "num_classes": 3}),
        },
        {"names": "deco_kernels", "model": "DeCo", "config": json.dumps({"width": 24, "colour": "red"})},
        {"names": "published", "weights": "best"},
    ],
)
def test_a_description_that_is_wrong(tmp_path, said):
    path = tmp_path / "model.safetensors"
    checkpoint_file.write_tensors(random_model().state_dict(), path, said)
    with pytest.raises(ValueError, match="model.safetensors: .*(description|expected one of DeCo|cannot be built)"):
        model.load_model(path)


@pytest.mark.parametrize("names", checkpoint_file.NAMES)
@pytest.mark.parametrize("entry", [{3: torch.zeros(1)}, {"denoiser.x": 3}])
def test_entries_that_are_no_named_tensors(tmp_path, names, entry):
    path = tmp_path / "model.pt"
    model.save_model(random_model(), path, names=names)
    content = torch.load(path)
    content["state_dict"] |= entry
    torch.save(content, path)
    for read in (model.load_model, lambda path: model.read_checkpoint(path).summary()):
        with pytest.raises(TypeError, match=r"model.pt: state_dict: expected dense tensors of .*, got"):
            read(path)


def quantized(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


UNUSABLE = {
    "sparse_coo float32": torch.Tensor.to_sparse,
    "sparse_csr float32": torch.Tensor.to_sparse_csr,
    "float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "complex64": lambda tensor: tensor.to(torch.complex64),
    "qint8": quantized,
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("names", checkpoint_file.NAMES)
@pytest.mark.parametrize("kind", UNUSABLE)
def test_tensors_that_no_model_takes_are_named(tmp_path, names, kind):
    path = tmp_path / "model.pt"
    model.save_model(random_model(), path, names=names)
    content = torch.load(path)
    name = next(name for name in content["state_dict"] if name.endswith("blocks.1.attn.proj.weight"))
    content["state_dict"][name] = UNUSABLE[kind](content["state_dict"][name].clone())
    torch.save(content, path)
    for read in (model.load_model, lambda path: model.read_checkpoint(path).summary()):
        with pytest.raises(TypeError, match=rf"model.pt: .*, got '{name}' \({kind}\); convert or remove"):
            read(path)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.complex64, torch.int64])
def test_safetensors_that_no_model_takes_are_named(tmp_path, dtype):
    path, net = tmp_path / "model.safetensors", random_model()
    state = net.state_dict() | {"trunk.patch_embed.bias": net.trunk.patch_embed.bias.detach().to(dtype)}
    said = {"names": "deco_kernels", "model": "DeCo", "config": json.dumps(net.config)}
    checkpoint_file.write_tensors(state, path, said)
    with pytest.raises(TypeError, match=rf"model.safetensors: .*'trunk.patch_embed.bias' \({str(dtype)[6:]}\)"):
        model.load_model(path)


@pytest.mark.parametrize("names", checkpoint_file.NAMES)
def test_tensors_without_values_are_named(tmp_path, names):
    path = tmp_path / "model.pt"
    with torch.device("meta"):
        net = model.build("deco-tiny")
    model.save_model(net, path, names=names)
    with pytest.raises(ValueError, match="model.pt: expected tensors with values, got .* meta .*blocks.1.norm1.weight"):
        model.read_checkpoint(path)


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize(
    ("name", "argument", "said"),
    [
        ("deco-tiny", {"save_memory": "no"}, "save_memory: expected True or False, got 'no'"),
        ("deco-tiny", {"backend": "abacus"}, "backend: unknown name 'abacus'"),
        ("deco-text-tiny", {"backend": 3}, "backend: expected a name or None, got int"),
        ("deco-tiny", {"depth": 10**7}, "depth: expected 2, the number of blocks .*, got 10000000"),
        ("dit-tiny", {"depth": 3}, "depth: expected 2, the number of blocks with tensors, got 3"),
        ("deco-tiny", {"decoder_depth": 10**7}, "decoder_depth: expected 3, the number of blocks .*, got 10000000"),
        ("deco-text-tiny", {"text_depth": 10**7}, "text_depth: expected 1, the number of blocks .*, got 10000000"),
        ("deco-tiny", {"width": 10**30}, "cannot be built"),
        ("dit-tiny", {"width": float("inf")}, "cannot be built"),
        ("deco-tiny", {"patch_size": 10**9}, "cannot be built|does not fit"),
    ],
)
def test_arguments_that_no_model_takes_are_named_at_once(tmp_path, ending, name, argument, said):
    path, net = tmp_path / f"model.{ending}", random_model(name)
    net.config = {**net.config, **argument}
    model.save_model(net, path)
    for read in (model.load_model, lambda path: model.read_checkpoint(path).summary()):
        with pytest.raises(ValueError, match=rf"model.{ending}: .*({said})"):
            read(path)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_existing_files_are_kept_unless_told(tmp_path, ending):
    path = tmp_path / f"model.{ending}"
    model.save_model(random_model(seed=1), path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        model.save_model(random_model(seed=2), path)
    assert path.read_bytes() == before
    model.save_model(random_model(seed=2), path, overwrite=True)
    same_bits(model.load_model(path).state_dict(), random_model(seed=2).state_dict())
    assert os.listdir(tmp_path) == [path.name]


def test_who_may_read_a_file_follows_from_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        for ending in ("ckpt", "safetensors"):
            model.save_model(random_model(), tmp_path / f"shared.{ending}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_a_file_is_replaced_while_it_is_read(tmp_path):
    path = tmp_path / "model.ckpt"
    model.save_model(random_model(seed=1), path)
    checkpoint = model.read_checkpoint(path)
    model.save_model(random_model(seed=2), path, overwrite=True)
    same_bits(checkpoint.model().state_dict(), random_model(seed=1).state_dict())


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_symbolic_links_stay_and_their_target_is_written(tmp_path, ending):
    store, shown = tmp_path / "store", tmp_path / "shown"
    store.mkdir(), shown.mkdir()
    target, link, chain = store / f"v1.{ending}", shown / f"latest.{ending}", shown / f"best.{ending}"
    link.symlink_to(os.path.relpath(target, shown))
    chain.symlink_to(link.name)
    for seed, path in ((1, link), (2, chain)):  # the first write makes the file that the link leads to
        model.save_model(random_model(seed=seed), path, overwrite=seed == 2)
        assert link.is_symlink() and chain.is_symlink() and not target.is_symlink()
        same_bits(model.load_model(target).state_dict(), random_model(seed=seed).state_dict())
        with pytest.raises(FileExistsError, match=f"{path.name}: exists"):
            model.save_model(random_model(), path)
    assert os.listdir(store) == [target.name] and sorted(os.listdir(shown)) == sorted([link.name, chain.name])


def test_links_that_lead_nowhere(tmp_path):
    circle, lost = tmp_path / "circle.pt", tmp_path / "lost.pt"
    circle.symlink_to(circle.name)
    lost.symlink_to("absent/model.pt")
    for path, said in ((circle, "symbolic links form a loop"), (lost, "lost.pt: cannot be written")):
        with pytest.raises(OSError, match=said):
            model.save_model(random_model(), path, overwrite=True)
        assert path.is_symlink()
    assert sorted(os.listdir(tmp_path)) == [circle.name, lost.name]


FULL = """
import resource, signal, sys
from deco_kernels import model
from tests.random_models import random_model
net = random_model()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for path in sys.argv[1:]:
    try:
        model.save_model(net, path, overwrite=True)
    except OSError as error:
        assert "cannot be written" in str(error) and "no partial file remains" in str(error), error
    else:
        sys.exit("no error")
"""


def test_a_write_that_fails_leaves_nothing_and_keeps_the_old_file(tmp_path):
    """The system refuses to write more than 100 kB, as on a full disk."""
    paths = [tmp_path / "model.ckpt", tmp_path / "model.safetensors"]
    for path in paths:
        path.write_bytes(b"old")
    finished = subprocess.run([sys.executable, "-c", FULL, *paths], capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    assert sorted(tmp_path.iterdir()) == paths
    assert all(path.read_bytes() == b"old" for path in paths)


def test_bad_targets(tmp_path):
    net = random_model()
    with pytest.raises(ValueError, match="expected a name with suffix .ckpt, .pt, .pth, .safetensors"):
        model.save_model(net, tmp_path / "model.bin")
    with pytest.raises(OSError, match="model.ckpt: cannot be written"):
        model.save_model(net, tmp_path / "absent" / "model.ckpt")
    with pytest.raises(ValueError, match="names: expected one of"):
        model.save_model(net, tmp_path / "model.ckpt", names="ours")
    with pytest.raises(ValueError, match="weights: expected one of"):
        model.save_model(net, tmp_path / "model.ckpt", weights="all")
    assert not os.listdir(tmp_path)
    os.mkfifo(tmp_path / "fifo.ckpt")
    with pytest.raises(OSError, match=r"fifo.ckpt: cannot be written \(it is a FIFO\)"):
        model.save_model(net, tmp_path / "fifo.ckpt", overwrite=True)
    assert (tmp_path / "fifo.ckpt").is_fifo()


def test_without_safetensors_the_error_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    model.save_model(random_model(), path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        model.load_model(path)
    with pytest.raises(ImportError, match="pip install safetensors"):
        model.save_model(random_model(), tmp_path / "again.safetensors")
    assert os.listdir(tmp_path) == [path.name]
