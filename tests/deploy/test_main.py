import json
import subprocess
import sys

import pytest
from PIL import Image

from deploy.__main__ import main
from deploy.release import write


def test_predict_prints_json_and_a_line_for_people(bundle, white, capsys):
    assert main(["predict", str(bundle), str(white)]) == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)
    assert row["image"] == str(white)
    assert [list(one) for one in row["detections"]] == [["box_xyxy", "score", "label", "class"]] * 3
    assert row["detections"][0]["box_xyxy"] == [10, 10, 30, 30]
    assert [one["class"] for one in row["detections"]] == ["cat", "dog", "dog"]
    assert printed.err == f"{white}: 1 cat, 2 dog\n"


def test_predict_json_prints_nothing_else(bundle, white, capsys):
    assert main(["predict", str(bundle), str(white), str(white), "--json", "--score", "0.65"]) == 0
    printed = capsys.readouterr()
    assert [len(row["detections"]) for row in json.loads(printed.out)] == [2, 2]
    assert printed.err == ""


def test_an_exported_file_will_do(model, white, capsys):
    assert main(["predict", str(model), str(white)]) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["detections"]) == 3


def test_an_unreadable_image_costs_only_itself(bundle, white, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("text")
    images = [str(tmp_path / "none.jpg"), str(white), str(tmp_path / "text.jpg")]
    assert main(["predict", str(bundle), *images, "--json"]) == 2
    printed = capsys.readouterr()
    assert [row["image"] for row in json.loads(printed.out)] == [str(white)]
    assert "none.jpg: no such image file" in printed.err
    assert "text.jpg: the image cannot be read" in printed.err


def test_predict_draws(bundle, tmp_path, new_image, capsys):
    # Two images of one name: neither drawing may overwrite the other.
    images = [new_image(tmp_path / file, size=(300, 300)) for file in ("a/street.jpg", "b/street.jpg", "solo.jpg")]
    assert main(["predict", str(bundle), *map(str, images), "--out", str(tmp_path / "out")]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["0001-street.png", "0002-street.png", "solo.png"]
    drawn = Image.open(tmp_path / "out" / "solo.png")
    assert drawn.size == (300, 300)
    edge, outside = (drawn.crop(box).getcolors() for box in ((44, 80, 50, 82), (150, 20, 290, 150)))
    assert len(edge) > 1  # the left side of the first box
    assert outside == [(140 * 130, (255, 255, 255))]


def test_a_drawing_that_cannot_be_written_is_a_users_error(bundle, white, capsys):
    assert main(["predict", str(bundle), str(white), "--out", str(white)]) == 2
    assert "it cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("score", ["1.5", "-1"])
def test_a_wrong_score_is_a_users_error(bundle, white, score, capsys):
    assert main(["predict", str(bundle), str(white), "--score", score]) == 2
    assert "error: --score" in capsys.readouterr().err


def test_a_users_error_is_one_line(tmp_path, white, capsys):
    assert main(["predict", str(tmp_path), str(white)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def test_validate_and_its_verdict(bundle, tmp_path, new_annotations, new_image, capsys):
    new_image(tmp_path / "images" / "1.png")
    file = new_annotations(tmp_path / "truth.json", [(1, 17, [10, 10, 20, 20]), (1, 18, [40, 40, 20, 24])], images=1)
    command = ["validate", str(bundle), "--images", str(tmp_path / "images"), "--annotations", str(file)]
    assert main([*command, "--min-ap", "0.75"]) == 0
    assert "ap                        0.7500" in capsys.readouterr().out
    assert main([*command, "--min-ap", "0.76", "--json", "--evaluator", "pycocotools"]) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out)["per_class"] == {"cat": pytest.approx(1), "dog": pytest.approx(0.5)}
    assert printed.err == "failed: AP 0.7500 is below 0.76\n"


def test_benchmark_of_the_sample_and_of_images(bundle, white, model, capsys):
    assert main(["benchmark", str(bundle), "--iterations", "20"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "decode",
        "preprocess",
        "inference",
        "postprocess",
        "end_to_end",
        "20 calls",
        "onnxruntime",
        "too few",
    ):
        assert part in printed
    assert main(["benchmark", str(model), str(white), "--iterations", "3", "--json", "--threads", "1"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["steps"]["inference"]["n"] == 3
    assert numbers["backend"]["threads"] == 1
    assert numbers["at_rate"] is None
    assert main(["benchmark", str(model)]) == 2
    assert "give images" in capsys.readouterr().err


def test_benchmark_sweeps_batches_and_threads(model, white, capsys):
    command = ["benchmark", str(model), str(white), "--iterations", "2", "--batch", "1,3", "--threads", "1,2"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["batch"], one["backend"]["threads"]) for one in found] == [(1, 1), (3, 1), (1, 2), (3, 2)]
    assert main(command) == 0
    assert capsys.readouterr().out.count("calls of 3 images") == 2


def test_benchmark_at_a_rate(model, white, capsys):
    command = ["benchmark", str(model), str(white), "--iterations", "20", "--rate", "200"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["at_rate"]
    assert found["rate"] == 200
    assert found["response"]["n"] == 20
    assert main(command) == 0
    assert "at 200 requests a second, ms from when each was due: p50 " in capsys.readouterr().out
    assert main([*command[:-1], "0"]) == 2
    assert "a rate above 0" in capsys.readouterr().err


def test_verify_and_its_verdict(bundle, capsys):
    assert main(["verify", str(bundle)]) == 0
    assert capsys.readouterr().out.count("ok") == 3
    (bundle / "model.onnx").write_bytes(b"other")
    assert main(["verify", str(bundle), "--json"]) == 3
    (check,) = json.loads(capsys.readouterr().out)
    assert check["passed"] is False
    assert "model.onnx was changed" in check["detail"]
    assert main(["verify", str(bundle / "model.onnx")]) == 2


def test_inspect(bundle, model, capsys):
    assert main(["inspect", str(bundle)]) == 0
    title, _, line = capsys.readouterr().out.splitlines()
    assert title.startswith("tiny, 2 classes, licence Apache-2.0, ")
    assert line.split()[:4] == ["model.onnx", "onnxruntime", "fp32", "0.5000"]
    assert line.endswith("taken: runs here, never measured")
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["licence"] == "Apache-2.0"
    assert main(["inspect", str(model)]) == 0
    assert json.loads(capsys.readouterr().out)["contract"]["classes"] == ["cat", "dog"]


def test_inspect_says_why_a_file_is_refused(tmp_path, model, entry, release, timing, capsys):
    engine = tmp_path / "fast.engine"
    engine.write_bytes(b"plan")
    models = [
        entry(model, latency=(timing(9, "some CPU"),)),
        entry(
            engine,
            file="fast.engine",
            made_for={"compute_capabilities": ["99.0"]},
            latency=(timing(1, "some GPU"),),
            rebuild="pipeline run x.yaml",
        ),
    ]
    write(tmp_path / "two", models, release, "card")
    assert main(["inspect", str(tmp_path / "two")]) == 0
    _, _, first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("taken: runs here, 9.00 ms on some CPU")
    assert "fast.engine" in second
    assert "refused: " in second
    assert "99.0" in second
    assert third.strip() == "make one for it: pipeline run x.yaml"
    assert main(["predict", str(tmp_path / "two"), "--model", "none.onnx", "x.png"]) == 2
    assert "choose one of model.onnx, fast.engine" in capsys.readouterr().err


def test_a_device_needs_neither_torch_nor_pydantic(bundle, white):
    # What a prediction and a verification import, in a process of their own.
    code = (
        "import sys; from deploy.__main__ import main; bundle, image = sys.argv[1:]; "
        "codes = [main(['predict', bundle, image, '--json']), main(['verify', bundle])]; "
        "print(codes, *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(bundle), str(white)], capture_output=True, text=True, check=True
    )
    codes, _, modules = done.stderr.strip().partition("] ")
    assert codes == "[0, 0"
    loaded = set(modules.split())
    assert {"numpy", "PIL", "onnxruntime", "deploy"} <= loaded
    unwanted = {"torch", "pydantic", "pipeline", "stages", "onnx", "hotcoco", "pycocotools", "yaml", "rich", "click"}
    assert not loaded & unwanted


def test_build_and_predict_with_what_was_built(new_convolution, tmp_path, white, capsys):
    pytest.importorskip("openvino", reason="OpenVINO is not installed; pip install 'headstart[openvino]'")
    onnx, engine = new_convolution("fp32"), tmp_path / "model.blob"
    assert main(["build", str(onnx), str(engine), "--backend", "openvino", "--set", "precision=fp32"]) == 0
    assert "the runtime built 1 in fp32" in capsys.readouterr().out
    assert main(["predict", str(engine), str(white), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["detections"]) == 3
    assert main(["build", str(onnx), str(engine), "--backend", "openvino", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["census"]["asked"] == "fp32"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--backend", "onnxruntime"], "takes the ONNX file as it is"),
        (["--backend", "tensorrt_rxt"], "there is no 'tensorrt_rxt'"),
        (["--backend", "openvino", "--set", "precision"], "--set: NAME=VALUE is wanted, given precision"),
        (["--backend", "openvino", "--set", "batch=[1, 1, 8]"], "unknown setting batch; it knows precision"),
    ],
)
def test_a_build_that_cannot_be_is_a_users_error(model, tmp_path, given, message, capsys):
    assert main(["build", str(model), str(tmp_path / "model.engine"), *given]) == 2
    assert message in capsys.readouterr().err
