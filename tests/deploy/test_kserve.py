"""Promises about the manifest for KServe: its fields are KServe's, and it is about the file that is exported."""

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = yaml.safe_load((ROOT / "deploy/inference_service.yaml").read_text())
SCHEMA = json.loads(Path(__file__).with_name("inference_service.schema.json").read_text())
PREDICTOR = MANIFEST["spec"]["predictor"]


def test_kserve_knows_every_field_of_the_manifest():
    Draft202012Validator.check_schema(SCHEMA)
    wrong = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(SCHEMA).iter_errors(MANIFEST)]
    assert wrong == []


def test_the_model_is_served_as_onnx_from_a_folder_that_the_reader_has_to_name():
    model = PREDICTOR["model"]
    assert (model["modelFormat"]["name"], model["protocolVersion"]) == ("onnx", "v2")
    assert re.fullmatch(r"\w+://\S+", model["storageUri"]) and not model["storageUri"].endswith(".onnx")
    assert "REPLACE" in (ROOT / "deploy/inference_service.yaml").read_text()


def test_the_container_has_limits_and_no_rights():
    model = PREDICTOR["model"]
    assert model["resources"]["requests"].keys() == model["resources"]["limits"].keys() == {"cpu", "memory"}
    assert PREDICTOR["securityContext"]["runAsNonRoot"] and PREDICTOR["securityContext"]["runAsUser"] > 0
    assert model["securityContext"]["allowPrivilegeEscalation"] is False
    assert model["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_request_that_the_readme_shows_is_one_that_the_exported_file_answers(exported):
    (shown,) = re.findall(r'^ +({"inputs".*})$', (ROOT / "deploy/README.md").read_text(), re.MULTILINE)
    (maps,) = json.loads(shown)["inputs"]
    data = np.array(maps["data"], maps["datatype"].lower()).reshape(maps["shape"])
    session = onnxruntime.InferenceSession(exported("lightning_cnn"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == f"tensor({maps['datatype'].lower()})"
    (probabilities,) = session.run(None, {maps["name"]: data})
    assert probabilities.shape == (1, len(json.loads(session.get_modelmeta().custom_metadata_map["class_names"])))
