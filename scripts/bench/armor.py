"""How soon the factorisation's descent reaches the loss where the paper's 20 000 Adam steps end.

Both start from NoWag-P's answer on the same matrix, 512 x 512, in one thread: two down projections of a
trained model, one above the other, with the diagonal of its real inputs. Without --model the matrix is random
with lognormal input norms.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from matplotlib import pyplot
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from structprune.solvers.armor.descent import ArmorSearch, Solver, factorise_weight

SIZE, TOKENS, LENGTH = 512, 4096, 512
Curve = list[tuple[float, float]]


def trained(folder: Path, text: Path) -> tuple[Tensor, Tensor]:
    """Return a weight [512, 512] of a trained Llama and the norms of its first part's inputs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    middle = len(model.model.layers) // 2
    linears = [model.model.layers[index].mlp.down_proj for index in (middle - 1, middle)]
    seen: list[Tensor] = []
    linears[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)[:, :SIZE]))
    ids = tokenizer(text.read_text(encoding="utf-8")[: TOKENS * 12], verbose=False)["input_ids"][:TOKENS]
    with torch.no_grad():
        model(torch.tensor(ids).view(-1, LENGTH))
    weight = torch.cat([linear.weight.detach()[:, :SIZE] for linear in linears])[:SIZE]
    return weight.clone(), seen[0].norm(dim=0)


def random(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a random weight [512, 512] and lognormal norms."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, SIZE, generator=draw), torch.randn(SIZE, generator=draw).exp()


def curve(weight: Tensor, norm: Tensor, wrapper: int, solver: Solver, rounds: int) -> Curve:
    """Return (CPU seconds, relative loss) as a solver goes; other processes do not count."""
    points: Curve = []
    begin = time.process_time()
    factors = factorise_weight(
        weight,
        norm,
        wrapper=wrapper,
        search=ArmorSearch(rounds=rounds, solver=solver, tolerance=0.0),
        watch=lambda loss: points.append((time.process_time() - begin, loss)),
    )
    return [(0.0, factors.initial), *points]


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Draw loss against seconds, both logarithmic."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, points in curves.items():
        axes.plot(*zip(*points[1:]), label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="CPU seconds, one thread", ylabel="loss / loss of the zero matrix"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run both solvers and print when descent passes Adam's last loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--wrapper", type=int, default=128)
    parser.add_argument("--adam-steps", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--png", type=Path)
    parser.add_argument(
        "--json", type=Path, help="where the curves go; Adam's is read from it if it is there"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    weight, norm = trained(options.model, options.text) if options.model else random()
    kept = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    slow = kept.get("adam") or curve(weight, norm, options.wrapper, "adam", options.adam_steps)
    if options.json:
        options.json.write_text(json.dumps({"adam": slow}))
    fast = curve(weight, norm, options.wrapper, "descent", options.rounds)
    if options.json:
        options.json.write_text(json.dumps({"adam": slow, "descent": fast}))
    seconds, last = slow[-1]
    print(f"wrapper {options.wrapper}, {options.adam_steps} Adam steps")
    print(f"NoWag-P  {slow[0][1]:.5f}\nAdam     {last:.5f} after {seconds:8.2f} s")
    for share in (1, 0.5, 0.2, 0.1, 0.05):
        loss = min((point for point in slow if point[0] <= share * seconds), key=lambda point: point[1])[1]
        when = next((at for at, reached in fast if reached <= loss), None)
        ours = f"descent {when:7.2f} s, {share * seconds / when:6.1f} x sooner" if when else "no comparison"
        print(f"loss {loss:.5f}: Adam {share * seconds:8.2f} s, {ours}")
    print(f"descent  {fast[-1][1]:.5f} after {fast[-1][0]:8.2f} s")
    if options.png:
        draw({"Adam": slow, "descent": fast}, options.png)


if __name__ == "__main__":
    main()
