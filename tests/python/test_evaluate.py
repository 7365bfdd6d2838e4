"""evaluate.py with a tiny random extractor, against distances and scores in closed form."""

import json
import sys
import urllib.error
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from evaluation.extractor import INCEPTION, Extractor
from evaluation.features import PART
from evaluation.metrics import frechet_distance, statistics_of
from tests.tiny_extractor import import_without_torchvision, register_tiny

COUNT = 24


@pytest.fixture(scope="module", autouse=True)
def fidelity():
    import_without_torchvision()


@pytest.fixture(autouse=True)
def tiny():
    return register_tiny()


def pixels(seed=0, count=COUNT, height=8, width=12):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_folder(folder, images):
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    return folder


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def run(tmp_path, samples, reference, *options):
    """(exit status, result)."""
    out = tmp_path / "out/result.json"
    arguments = [samples, reference, "--out", out, "--extractor", "tiny-random", *options]
    status = evaluate.main([str(argument) for argument in arguments])
    return status, json.loads(out.read_text()) if status == 0 else None


def tiny_features(images):
    return Extractor("tiny-random", None, torch.device("cpu"))(torch.from_numpy(images).permute(0, 3, 1, 2))


# --- values -----------------------------------------------------------------------------------------------------------


def test_distance_of_known_gaussians():
    """Diagonal covariances commute: |μ1 - μ2|² + Σ(√a - √b)²."""
    generator = np.random.default_rng(0)
    (mean, other), (a, b) = generator.normal(size=(2, 7)), generator.uniform(0.1, 2, size=(2, 7))
    turn = np.linalg.qr(generator.normal(size=(7, 7)))[0]
    expected = ((mean - other) ** 2).sum() + ((a**0.5 - b**0.5) ** 2).sum()
    found = frechet_distance((mean, turn @ np.diag(a) @ turn.T), (other, turn @ np.diag(b) @ turn.T))
    assert found == pytest.approx(expected, rel=1e-9)


def test_reference_statistics_of_a_known_distance(tmp_path):
    """For the mean μ + d and the covariance 4·Σ the distance is |d|² + tr Σ."""
    samples = npz(tmp_path / "samples.npz", arr_0=pixels())
    ours, arrays, expected = statistics_of(tiny_features(pixels())), {}, {}
    for metric, name, keys in (("fid", "pool", ("mu", "sigma")), ("sfid", "spatial", ("mu_s", "sigma_s"))):
        mean, covariance = ours[name]
        arrays |= {keys[0]: mean + 0.3, keys[1]: 4 * covariance}
        expected[metric] = len(mean) * 0.3**2 + np.trace(covariance)
    status, result = run(tmp_path, samples, npz(tmp_path / "reference.npz", **arrays))
    assert status == 0
    for metric, value in expected.items():
        assert result["metrics"][metric] == pytest.approx(value, rel=1e-5)
    assert result["missing"] == dict.fromkeys(("precision", "recall"), "the reference has no images")
    assert result["reference"]["statistics"] == ["pool", "spatial"]
    status, result = run(tmp_path, samples, npz(tmp_path / "fid.npz", mu=arrays["mu"], sigma=arrays["sigma"]))
    assert result["metrics"]["fid"] == pytest.approx(expected["fid"], rel=1e-5) and "sfid" not in result["metrics"]
    assert result["missing"]["sfid"] == "the reference has no statistics of the features 'spatial'"


def test_inception_score_is_that_of_the_formula(tmp_path):
    """exp(mean KL(p(y|x) ‖ p(y))) per split, over the order in which the library draws the splits."""
    samples = npz(tmp_path / "samples.npz", arr_0=pixels())
    _, result = run(tmp_path, samples, samples)
    p = tiny_features(pixels())["logits"].double().softmax(1).numpy()
    p = p[np.random.RandomState(2020).permutation(COUNT)]
    splits = [p[i * COUNT // 10 : (i + 1) * COUNT // 10] for i in range(10)]
    scores = [np.exp((split * np.log(split / split.mean(0))).sum(1).mean()) for split in splits]
    assert result["metrics"]["inception_score"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert result["metrics"]["inception_score_std"] == pytest.approx(np.std(scores), rel=1e-6)


def test_precision_and_recall(tmp_path):
    """Both 1 for the same images, both 0 for distant ones, and asymmetric for a part of the reference."""
    dark = npz(tmp_path / "dark.npz", arr_0=pixels() // 16)
    bright = npz(tmp_path / "bright.npz", arr_0=255 - pixels() // 16)
    both = npz(tmp_path / "both.npz", arr_0=np.concatenate([pixels() // 16, 255 - pixels() // 16]))
    found = {}
    for name, other in (("same", dark), ("distant", bright), ("part", both)):
        metrics = run(tmp_path, dark, other)[1]["metrics"]
        found[name] = (metrics["precision"], metrics["recall"])
        assert (abs(metrics["fid"]) < 1e-6) == (name == "same")
    assert found == {"same": (1, 1), "distant": (0, 0), "part": (1, 0.5)}


def test_folder_and_archive_of_the_same_images_agree(tmp_path, capsys):
    folder = write_folder(tmp_path / "run/images", pixels())
    (tmp_path / "run/run.json").write_text("{}")
    Image.new("RGB", (5, 5)).save(tmp_path / "run/grid_16.png")  # beside the images of sample.py
    packed = tmp_path / "packed.npz"
    np.savez_compressed(packed, arr_0=pixels())
    reference = npz(tmp_path / "reference.npz", arr_0=pixels(1))
    results = [run(tmp_path, samples, reference)[1]["metrics"] for samples in (tmp_path / "run", folder, packed)]
    assert results[0] == results[1] == results[2]
    assert capsys.readouterr().err.count("FID and recall of fewer than 10,000 are biased") == 6


# --- cache ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_continues(tmp_path, tiny, monkeypatch):
    samples = npz(tmp_path / "samples.npz", arr_0=pixels(count=PART + 40, height=2, width=2))
    reference = npz(tmp_path / "reference.npz", arr_0=pixels(1, height=2, width=2))
    forward, limit = tiny.forward, PART + 10

    def stopped(self, images):
        if tiny.calls > limit:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(tiny, "forward", stopped)
    assert run(tmp_path, samples, reference, "--batch", 20)[0] == 130
    monkeypatch.setattr(tiny, "forward", forward)
    before = tiny.calls
    status, result = run(tmp_path, samples, reference, "--batch", 20)
    assert status == 0 and tiny.calls - before == 40 + COUNT  # the second part, and the reference
    before = tiny.calls
    assert run(tmp_path, samples, reference)[1] == result and tiny.calls == before
    (part, *_) = sorted((tmp_path / "out/features").rglob("000000.npz"))
    part.write_bytes(part.read_bytes()[:100])
    assert run(tmp_path, samples, reference)[1] == result and tiny.calls > before
    npz(samples, arr_0=pixels(2, count=PART + 40, height=2, width=2))
    assert run(tmp_path, samples, reference)[1]["metrics"] != result["metrics"]


# --- Inception --------------------------------------------------------------------------------------------------------


@pytest.fixture
def random_inception(monkeypatch):
    """The library's Inception with random weights in place of the downloaded ones."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)


def test_features_of_inception(random_inception):
    extractor = Extractor(INCEPTION, None, torch.device("cpu"))
    blocks = []
    extractor.network.Mixed_6d.register_forward_hook(lambda module, inputs, result: blocks.append(result))
    images = torch.from_numpy(pixels(count=1)).permute(0, 3, 1, 2)
    features = extractor(images)
    assert {name: list(value.shape) for name, value in features.items()} == {
        "pool": [1, 2048], "logits": [1, 1008], "spatial": [1, 2023],
    }  # fmt: skip
    # The 1x1 convolution is the first branch of the block.
    assert torch.equal(features["spatial"].unflatten(1, (17, 17, 7)), blocks[0][:, :7].permute(0, 2, 3, 1))
    assert features["spatial"].std() > 0


def test_weights_that_cannot_be_downloaded(tmp_path, capsys, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as module

    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(module, "load_state_dict_from_url", unreachable)
    samples = npz(tmp_path / "samples.npz", arr_0=pixels())
    assert run(tmp_path, samples, samples, "--extractor", INCEPTION)[0] == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: --weights: the weights of {INCEPTION} cannot be downloaded")
    assert module.URL_INCEPTION_V3 in said and "give the path of the file" in said


class Code:
    def __reduce__(self):
        return print, ("ran",)


def test_weights_that_are_refused(tmp_path, capsys):
    samples = npz(tmp_path / "samples.npz", arr_0=pixels())
    for content, message in (
        (None, "expected a file, found none"),
        (Code(), "is damaged, or not a file of plain tensors"),
        ({"fc.weight": torch.zeros(3)}, f"does not fit {INCEPTION}"),
    ):
        weights = tmp_path / "weights.pth"
        if content is not None:
            torch.save(content, weights)
        assert run(tmp_path, samples, samples, "--extractor", INCEPTION, "--weights", weights)[0] == 2
        said = capsys.readouterr()
        assert message in said.err.splitlines()[-1] and "ran" not in said.out


# --- bad input --------------------------------------------------------------------------------------------------------


def bad_inputs(tmp_path):
    """(samples, reference, options, message)."""
    good = npz(tmp_path / "good.npz", arr_0=pixels())
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "mixed").mkdir()
    for index in range(12):
        Image.fromarray(pixels(count=1, width=12 + (index == 11))[0]).save(tmp_path / f"mixed/{index:02d}.png")
    damaged = write_folder(tmp_path / "damaged", pixels())
    (damaged / "000005.png").write_bytes((damaged / "000005.png").read_bytes()[:60])
    with zipfile.ZipFile(good) as archive:
        content = archive.read("arr_0.npy")
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("arr_0.npy", content[:-50])
    with zipfile.ZipFile(tmp_path / "content.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"no array")
    with zipfile.ZipFile(tmp_path / "bytes.npz", "w") as archive:
        archive.writestr("mu.npy", b"no array")
        archive.writestr("sigma.npy", b"no array")
    np.savez_compressed(tmp_path / "crc.npz", arr_0=pixels())
    compressed = bytearray((tmp_path / "crc.npz").read_bytes())
    compressed[len(compressed) // 2] ^= 0xFF
    (tmp_path / "crc.npz").write_bytes(compressed)
    nan = npz(tmp_path / "nan.npz", mu=np.full(5, np.nan), sigma=np.eye(5))
    objects = npz(tmp_path / "objects.npz", mu=np.array([None] * 5), sigma=np.eye(5))
    statistics = npz(tmp_path / "statistics.npz", mu=np.zeros(5), sigma=np.eye(5))
    other_size = npz(tmp_path / "other.npz", arr_0=pixels(height=16), mu=np.zeros(5), sigma=np.eye(5))
    return [
        (good, other_size, [], "expected a reference of 8x12 like the samples, got 16x12; give the reference of this"),
        (good, npz(tmp_path / "f.npz", mu=np.zeros(9), sigma=np.eye(9)), [], "covariance of 5 features 'pool'"),
        (good, npz(tmp_path / "g.npz", mu=np.zeros((2, 5)), sigma=np.eye(5)), [], "mu: expected floating-point"),
        (good, nan, [], "nan.npz: mu: expected finite numbers, got infinity or NaN; compute the statistics again"),
        (good, objects, [], "objects.npz: mu: expected an array of numbers, got another content"),
        (good, tmp_path / "bytes.npz", [], "bytes.npz: mu: expected floating-point numbers of rank 1, got |S8 []"),
        (good, tmp_path / "content.npz", [], "content.npz: expected an array of NumPy under arr_0"),
        (good, tmp_path / "crc.npz", [], "crc.npz: the file is damaged"),
        (good, npz(tmp_path / "h.npz", images=pixels()), [], "expected images under arr_0, or statistics under mu and"),
        (good, tmp_path / "absent", [], "absent: expected a folder of images or an .npz file, found nothing"),
        (statistics, good, [], "found only statistics; they can be the reference alone"),
        (npz(tmp_path / "few.npz", arr_0=pixels(count=9)), good, [], "samples: expected at least 10 images, got 9"),
        (npz(tmp_path / "float.npz", arr_0=pixels() / 255), good, [], "expected images uint8 [n, H, W, 3] under arr_0"),
        (tmp_path / "empty", good, [], "expected images (.png, .jpg, .jpeg, .webp), found none"),
        (tmp_path / "text.npz", good, [], "text.npz: expected an .npz file"),
        (tmp_path / "cut.npz", good, [], "expected 24 images under arr_0, the file ends before"),
        (tmp_path / "mixed", good, [], "11.png: expected 8x12 like 00.png, got 8x13; give images of one size"),
        (damaged, good, [], "000005.png: the image is damaged"),
        (good, good, ["--extractor", "none"], "--extractor: expected one of"),
    ]  # fmt: skip


def test_bad_input_is_one_line(tmp_path, capsys):
    for samples, reference, options, message in bad_inputs(tmp_path):
        assert run(tmp_path, samples, reference, *options)[0] == 2, message
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: ") and message in said, said
    assert not (tmp_path / "out/result.json").exists()


def test_a_missing_library_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    samples = npz(tmp_path / "samples.npz", arr_0=pixels())
    assert run(tmp_path, samples, samples)[0] == 2
    assert "evaluate.py needs torch-fidelity and, of the same build as PyTorch, torchvision" in capsys.readouterr().err
