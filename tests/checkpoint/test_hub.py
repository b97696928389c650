import fnmatch

import pytest

from jaxinfer.checkpoint import hub


def test_a_folder_is_itself(tmp_path):
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_what_cannot_be_had_is_named():
    message = "model 'nobody/no-such-model' is no folder, and not available from Hugging Face: .+"
    with pytest.raises(ValueError, match=message):
        hub.resolve("nobody/no-such-model")


@pytest.mark.parametrize("model", ["./no/such/folder", "./folder", "/no/folder", "~/folder", "no/such/one", "no id!"])
def test_no_hub_is_asked_for_what_cannot_be_an_id(model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=f"model '{model}' is no folder; expected one, or a Hugging Face id"):
        hub.resolve(model)


@pytest.mark.parametrize("model", [5, None, "", b"org/name"])
def test_what_is_no_name_at_all(model):
    with pytest.raises(ValueError, match=f"model = {model!r} must be a folder or a Hugging Face id"):
        hub.resolve(model)


def test_only_weights_and_their_descriptions_are_downloaded(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **patterns: asked.update(patterns) or str(tmp_path)
    )
    assert hub.resolve("org/name") == tmp_path

    def wanted(file):
        allowed, ignored = asked["allow_patterns"], asked["ignore_patterns"]
        return any(fnmatch.fnmatch(file, p) for p in allowed) and not any(fnmatch.fnmatch(file, p) for p in ignored)

    for file in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert wanted(file)
    for file in ("pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "README.md"):
        assert not wanted(file)
