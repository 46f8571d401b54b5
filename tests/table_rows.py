"""The table of bad inputs, rows 1 to 52: what each input must end with, and name.

The numbers are those of the table. A row may have several inputs; every one of them must be taken as it says.
"""

import os

import torch

from tests import damage, table_cases
from tests.checkpoints import shard_name, tensors
from tests.damage import FILE, HEAD, INDEX, Q
from tests.forks import Around, Stop
from tests.table_cases import Case, llama, model, recipe, words

HEADS = "model: model\noutput: out\n"
PRUNE = "prune: {method: magnitude, sparsity: 0.5}\n"
FULL = os.strerror(28)
FIRST, SECOND, THIRD = (shard_name(number, 3) for number in range(3))
OTHER = "model-00004-of-00004.safetensors"
SHAPES = "[3, 8], expected [12, 8]"


def full(call: int) -> Case:
    """Stand-in for a full disk: every call that takes room fails from one on."""
    stop = Stop("call", call, "ENOSPC")
    return Case("full disk", words("", told=()).line, 4, ("out", FULL), stop)


def refused(what: str, patch: str, *told: str, code: int = 4) -> Case:
    """Return a run on a machine that refuses something; the stand-in for the machine is named."""
    line = llama("", table_cases.on_text).line
    return Case(what, line, code, told, around=Around(patch=f"stand_ins:{patch}"))


ROWS: dict[int, tuple[Case, ...]] = {
    1: (
        model("cut off", damage.cut_off, SECOND, "bytes, expected"),
        model("cut off in its header", damage.cut_inside_header, FILE, "200 bytes"),
    ),
    2: (model("empty", damage.empty, THIRD, "empty", "interrupted"),),
    3: (model("header of 2^62 bytes", damage.huge_header, FILE, str(2**62)),),
    4: (
        model("overlap", damage.overlapping, FILE, HEAD, "overlaps"),
        model("hole", damage.holed, FILE, "hole"),
        model("trailing bytes", damage.trailing, FILE, "without a meaning"),
    ),
    5: (
        model("overflow", damage.overflowing, FILE, Q, "larger than any memory"),
        model("overflow beside a zero", damage.overflowing_behind_a_zero, FILE, "ghost.weight"),
    ),
    6: (model("a name twice", damage.twice_in_header, FILE, Q, "twice"),),
    7: (
        model("too long a header", damage.too_long_header, FILE, "33000000"),
        model("200 000 tensors", table_cases.many_names, "x0"),
    ),
    8: (model("unknown dtype", damage.unknown_dtype, FILE, Q, "'F4'", "BF16"),),
    9: (
        model("header not UTF-8", damage.header_not_utf8, FILE, "not UTF-8", "byte", "0xff"),
        model("index not UTF-8", damage.index_not_utf8, INDEX, "not UTF-8", "byte", "0xff"),
    ),
    10: (model("missing shards", damage.two_missing_shards, FIRST, THIRD),),
    11: (
        model("listed but absent", damage.listed_but_absent, INDEX, "ghost.weight"),
        model("absent", damage.missing_tensor, Q, "missing"),
    ),
    12: (
        model("not part of the model", damage.unexpected_tensor, "model.surprise.weight", "not part"),
        model("not in the index", damage.not_in_index, INDEX, Q),
        model("a shard not in the index", damage.shard_not_in_index, OTHER),
        Case(
            "looked at only",
            table_cases.inspecting(damage.unexpected_tensor),
            0,
            ("warning", "model.surprise.weight"),
        ),
        Case(
            "looked at strictly",
            table_cases.inspecting(damage.unexpected_tensor, "--strict"),
            3,
            ("model.surprise.weight",),
        ),
    ),
    13: (model("in two shards", damage.in_two_shards, HEAD, FIRST, "two files"),),
    14: (model("a key twice in the index", damage.key_twice_in_index, INDEX, HEAD, "twice"),),
    15: (
        model("a list", damage.index_is([]), INDEX, "weight_map"),
        model("null", damage.index_is(None), INDEX, "weight_map"),
        model("weight_map a list", damage.index_is({"weight_map": []}), INDEX, "weight_map"),
    ),
    16: (model("leads up", damage.weight_map_value("../../x.safetensors"), INDEX, Q, "plain file name"),),
    17: (model("absolute", damage.weight_map_value("/x.safetensors"), INDEX, Q, "plain file name"),),
    18: (model("link out", damage.link_outside, FILE, "leads out", "--allow-external-symlinks"),),
    19: (
        model("pipe", damage.pipe, FILE, "a pipe"),
        model("folder", damage.folder_as_shard, FIRST, "a folder"),
    ),
    20: (
        model("pickle", damage.only("pytorch_model.bin"), "pytorch_model.bin", "pickle"),
        model("nemo", damage.only("model.nemo"), "model.nemo"),
    ),
    21: (
        model("missing", damage.no_config, "config.json"),
        model("cut off", damage.config_text('{"hidden_size": 8,'), "config.json", "line 1"),
        model("100 MB", table_cases.hundred_megabytes, "config.json", "bytes"),
        model("NaN", damage.config_text('{"rope_theta": NaN}'), "config.json", "NaN"),
        model("a key twice", damage.config_text('{"a": 1, "a": 2}'), "config.json", "'a'", "twice"),
    ),
    22: (model("deep", damage.config_text('{"a":' * 100_000), "config.json", "nested too deeply"),),
    23: (
        model("fewer blocks", damage.one_block_less, "describes 2 blocks", "hold 1"),
        model("more blocks", damage.one_block_more, "describes 2 blocks", "hold 3"),
    ),
    24: (model("shapes", damage.six_other_shapes, "6 tensors", SHAPES),),
    25: (
        model("code", damage.settings(auto_map={"AutoModel": "x.Y"}), "--trust-remote-code", "--revision"),
        model(
            "code that trusts itself",
            damage.settings(auto_map={"AutoModel": "x.Y"}, trust_remote_code=True),
            "--trust-remote-code",
        ),
    ),
    26: (
        model(
            "private key",
            damage.settings(_attn_implementation_internal="evil/kernel"),
            "warning",
            "_attn_implementation_internal",
            code=0,
        ),
    ),
    27: (model("NaN", damage.not_finite, FILE, Q, "1 NaN and 2 infinite", "--allow-nonfinite"),),
    28: (model("constant", table_cases.one_constant, "warning", Q, code=0),),
    29: (
        model("size 0", damage.settings(intermediate_size=0), "config.json", "intermediate_size"),
        model("no blocks", damage.settings(num_hidden_layers=0), "config.json", "num_hidden_layers"),
        model("a tensor of size 0", damage.size_zero, Q, "[0, 8]"),
    ),
    30: (
        model("tied", lambda folder: table_cases.tied(folder, head=None), code=0),
        model(
            "tied, other values",
            lambda folder: table_cases.tied(folder, head=tensors()[HEAD]),
            HEAD,
            "different values",
        ),
    ),
    31: (refused("stand-in: a tensor without data", "tensor_without_data", "has no data", code=1),),
    32: (model("fp8", damage.as_dtype(torch.float8_e4m3fn), Q, "quantised (fp8)", "F8_E4M3"),),
    33: (
        model("int8", damage.as_dtype(torch.int8), Q, "I8", "quantised"),
        model(
            "quantization_config",
            damage.settings(quantization_config={"quant_method": "awq", "bits": 4}),
            "quantization_config",
            "awq",
        ),
    ),
    34: (model("mixed dtypes", table_cases.mixed, "warning", "mixed dtypes", code=0),),
    35: (
        llama("pruned already", table_cases.pruned_already(), "warning", "pruned", code=0),
        llama("forbidden", table_cases.pruned_already("--from-dense"), "is pruned already"),
    ),
    36: (
        model("an adapter of PEFT", damage.adapter, "adapter_config.json", "merge"),
        llama("an adapter of ours", table_cases.kept_adapter, "adapter", "recover"),
    ),
    37: (
        model("GGUF", damage.only("model-q4.gguf"), "GGUF"),
        model("ONNX", damage.only("model.onnx"), "ONNX"),
        model("MLX", damage.mlx, FILE, "MLX"),
    ),
    38: (llama("too many tokens", table_cases.large_vocabulary, "619", "320"),),
    39: (
        llama("no tokenizer", table_cases.no_tokenizer, "tokenizer", "--tokenizer"),
        model("none needed", damage.settings(), code=0),
    ),
    40: (llama("too short", table_cases.text(b"x" * 20), "20 tokens", "2 samples of length 16 need 32"),),
    41: (
        llama("empty", table_cases.text(b""), "no text"),
        llama("empty rows", table_cases.text(b'{"text": ""}\n', "bad.jsonl"), "no text"),
        llama(
            "another column",
            table_cases.text(b'{"page": "x", "id": 1}\n', "bad.jsonl"),
            "columns are: id, page",
        ),
    ),
    42: (llama("too long", table_cases.too_long, "129", "128", code=2),),
    43: (
        llama("not UTF-8", table_cases.text(b"bad \xff line"), "not UTF-8 at byte 4"),
        llama("NUL", table_cases.text(b"binary \x00 line"), "NUL byte at byte 7"),
        llama("one line of 5 GB", table_cases.endless, "line 1", "byte 0"),
    ),
    44: (
        *(
            words(text, f"--sparsity={text}", told=(said,))
            for text, said in {
                "-0.1": "sparsity",
                "1": "everything",
                "1.5": "sparsity",
                "nan": "sparsity",
                "inf": "sparsity",
                "50": "did you mean 0.5?",
            }.items()
        ),
        words("0", "--sparsity", "0", told=(), code=0),
        words("50%", "--sparsity", "50%", told=(), code=0),
    ),
    45: (words("nothing", "--sparsity=0.001", "--set", "compare=row", told=("0.001", "0.0157")),),
    46: (recipe("a key twice", HEADS + "seed: 1\n" + PRUNE + "seed: 2\n", "'seed'", "line 3", "line 5"),),
    47: (
        recipe(
            "a typo", HEADS + "prune: {method: magnitude, sparisty: 0.5}\n", "prune.sparisty", "'sparsity'"
        ),
    ),
    48: (
        recipe("no", HEADS + PRUNE + "seed: no\n", "seed"),
        recipe("010", HEADS + PRUNE + "seed: 010\n", "010"),
        recipe("1:30", HEADS + PRUNE + "seed: 1:30\n", "seed", "1:30"),
        recipe("true", HEADS + "prune: {method: magnitude, sparsity: true}\n", "prune.sparsity"),
        recipe("1e-3", HEADS + "prune: {method: magnitude, sparsity: 5e-1}\n", code=0),
    ),
    49: (
        recipe("400 digits", HEADS + PRUNE + f"seed: {'9' * 400}\n", "line 4", "400 digits"),
        recipe("5000 digits", HEADS + PRUNE + f"seed: {'9' * 5000}\n", "recipe.yaml"),
        words("digits in a flag", "--samples", "9" * 400, told=("samples",)),
    ),
    50: (
        llama("the input", table_cases.output("model"), "is the model itself", code=2),
        llama("inside", table_cases.output("model", "out"), "inside", code=2),
        llama("around", table_cases.output("."), "holds the model", code=2),
        llama("through a link", table_cases.output("link"), "is the model itself", code=2),
    ),
    51: (llama("occupied", table_cases.occupied, "taken", "--overwrite", code=4),),
    52: (
        full(10),
        full(60),
        refused("stand-in: a disk that is read-only", "read_only_disk", "cannot be written"),
        refused("stand-in: a full quota", "full_quota", "quota"),
        refused("stand-in: CUDA out of memory", "cuda_out_of_memory", "out of memory", "--stream"),
        refused("stand-in: memory", "no_memory", "out of memory"),
    ),
}
assert list(ROWS) == list(range(1, 53))
