import json
from pathlib import Path

import numpy as np
import pytest

from deploy.backend import names, open_backend
from deploy.backends import onnxruntime as adapter
from deploy.errors import DeployError


def white(count, height=64, width=64):
    return np.full((count, height, width, 3), 255, np.uint8)


def test_candidates_of_a_batch(model):
    with open_backend(model) as backend:
        candidates = backend.infer(np.concatenate([white(1), white(1) // 5]))
    assert candidates.boxes_BN4.shape == (2, 4, 4)
    np.testing.assert_allclose(candidates.scores_BN[0], [0.9, 0.8, 0.7, 0.6], rtol=1e-6)
    np.testing.assert_allclose(candidates.scores_BN[1], np.asarray([0.9, 0.8, 0.7, 0.6]) * 0.2, rtol=1e-6)
    assert candidates.labels_BN.tolist() == [[0, 0, 1, 1]] * 2


def test_results_are_fresh_arrays(model):
    with open_backend(model) as backend:
        first = backend.infer(white(1))
        kept = first.scores_BN.copy()
        backend.infer(white(1) // 2)
    np.testing.assert_array_equal(first.scores_BN, kept)


@pytest.mark.parametrize("images", [white(1, 32), white(1).astype(np.float32), white(1)[0]])
def test_other_shapes_and_types_are_refused(model, images):
    with open_backend(model) as backend, pytest.raises(DeployError, match="images must be uint8 of shape"):
        backend.infer(images)


def test_identity_says_what_was_really_used(model):
    with open_backend(model, threads=1) as backend:
        identity = backend.identity()
    assert identity["provider"] == "CPUExecutionProvider"
    assert identity["threads"] == 1
    assert identity["device"]


def test_unknown_names_and_settings_list_what_there_is(model):
    assert "onnxruntime" in names()
    with pytest.raises(DeployError, match=r"there is no 'onnx_runtime'; choose one of .*onnxruntime"):
        open_backend(model, "onnx_runtime")
    with pytest.raises(DeployError, match="unknown setting thread; it knows provider, threads"):
        open_backend(model, thread=1)
    with pytest.raises(DeployError, match="unknown provider 'gpu'; choose one of cpu, cuda"):
        open_backend(model, provider="gpu")
    with pytest.raises(DeployError, match="threads must be at least 1"):
        open_backend(model, threads=0)


def test_a_provider_that_is_not_there_is_an_error_not_a_fallback(model):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(DeployError, match="provider cuda is not in this build"):
        open_backend(model, provider="cuda")


def test_a_session_on_another_provider_is_an_error():
    adapter.check_provider("CUDAExecutionProvider", ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(DeployError, match="CUDAExecutionProvider was asked for, the session runs on CPU"):
        adapter.check_provider("CUDAExecutionProvider", ["CPUExecutionProvider"])


def test_a_silent_fallback_is_caught_when_the_file_is_opened(model, monkeypatch):
    import onnxruntime

    # As where the driver is missing: the provider is in the build, the session starts without it.
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda file, options, **_: real(file, options, ["CPUExecutionProvider"])
    )
    with pytest.raises(DeployError, match="the session runs on CPUExecutionProvider"):
        open_backend(model, provider="cuda")


@pytest.fixture
def profile(new_convolution, tmp_path):
    """What ONNX Runtime itself says of a session on the CPU: which node ran where, and how much it gave."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(new_convolution("fp32"), options, ["CPUExecutionProvider"])
    session.run(None, {"images": white(1)})
    return json.loads(Path(session.end_profiling()).read_text())


def test_every_node_that_matters_must_run_where_it_was_asked_to(profile):
    counts = adapter.check_nodes("CPUExecutionProvider", profile)
    assert set(counts) == {"CPUExecutionProvider"}
    assert counts["CPUExecutionProvider"] > 3
    with pytest.raises(
        DeployError, match=r"CUDAExecutionProvider was asked for and \d+ nodes .*Conv on CPUExecutionProv"
    ):
        adapter.check_nodes("CUDAExecutionProvider", profile)


def test_a_few_numbers_may_be_computed_elsewhere():
    def ran(name, provider, size):
        return {"cat": "Node", "name": name, "args": {"op_name": name, "provider": provider, "output_size": str(size)}}

    events = [ran("Conv", "CUDA", 10**6), ran("Shape", "CPU", 8), {"cat": "Session", "name": "run"}]
    assert adapter.check_nodes("CUDA", events) == {"CUDA": 1, "CPU": 1}
    with pytest.raises(DeployError, match="1 nodes that matter run elsewhere: TopK on CPU"):
        adapter.check_nodes("CUDA", [*events, ran("TopK", "CPU", 8000)])
    with pytest.raises(DeployError, match="all nodes that matter run elsewhere"):
        adapter.check_nodes("CUDA", events[1:])


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "openvino"])
def test_a_provider_that_is_there_runs_the_nodes(provider, new_convolution):
    file = new_convolution("fp32")
    try:
        backend = open_backend(file, provider=provider)
    except DeployError as problem:
        if "is not in this build" not in str(problem):
            raise
        pytest.skip(str(problem))
    with backend, open_backend(file) as reference:
        assert next(iter(backend.identity()["nodes"])).lower().startswith(provider)
        found, wanted = backend.infer(white(2)), reference.infer(white(2))
    np.testing.assert_allclose(found.scores_BN, wanted.scores_BN, rtol=1e-4)


def test_two_distributions_are_refused(tmp_path):
    for name in ("onnxruntime-1.31.1", "onnxruntime_gpu-1.31.1", "onnxruntime_extensions-0.14.0", "numpy-2.4.6"):
        (tmp_path / f"{name}.dist-info").mkdir()
    found = adapter.installed(tmp_path)
    assert found == ["onnxruntime", "onnxruntime-gpu"]
    with pytest.raises(DeployError, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        adapter.refuse_shadowed(found)
    adapter.refuse_shadowed(found[:1])


def test_files_that_cannot_be_opened_are_named(tmp_path):
    with pytest.raises(DeployError, match=r"none\.onnx: no such model file"):
        open_backend(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(DeployError, match=r"text\.onnx: ONNX Runtime .* cannot open"):
        open_backend(tmp_path / "text.onnx")


def test_a_graph_with_other_names_is_refused(new_model, new_contract, tmp_path):
    file = new_model(tmp_path / "other.onnx", new_contract(output_names=("box", "scores", "labels")))
    with pytest.raises(DeployError, match="must take images and give box, scores, labels"):
        open_backend(file)
