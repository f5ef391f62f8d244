"""A cost model of an adversarial training step on 1 to 1,024 devices, and its terms checked here.

    python -m benchmarks.scaling --model=preact_resnet --image=32,32,3 --chip="NVIDIA H200"
    python -m benchmarks.scaling --model=wide_resnet --dtype=bfloat16 --tpu=v5e:2x4
    python -m benchmarks.scaling --model=preact_resnet --tpu=v5e:2x2 --work=attacks

The first command compiles the step for 1, 2, 4 and 8 simulated CPU devices, runs nothing, and
prints what the model says of one device (operations, bytes of all-reduce, bytes of the state)
beside what the programs hold. Then it predicts step times. docs/scaling.md has the formulas. The
second one asks a TPU's compiler, which comes with the tpu extra and needs no TPU, whether the step
fits. The third asks it about AutoAttack's members, one target or restart each, and exact Jacobian
norms.
"""

import argparse
import math
import os
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.timing import heading
from robust_jax import attacks, jacobian, losses, models
from robust_jax.app.training import apply_fn, network
from robust_jax.attacks._autoattack import MEMBERS, VERSIONS
from robust_jax.devices import parallel, speed
from robust_jax.train.objectives import Adversary, make_objective
from robust_jax.train.state import init_state
from robust_jax.train.step import make_train_step


class Links(NamedTuple):
    """Bytes a second that a device sends and receives at once, and the seconds a message takes."""

    bandwidth: float
    latency: float


class Work(NamedTuple):
    """What a step needs, apart from the number of devices."""

    flops_per_example: float
    reduced_values: int  # float32, all-reduced once a step


def allreduce_seconds(values: int, devices: int, links: Links) -> float:
    """Seconds of a ring, where each device sends 2 (n-1)/n of the array, with a tree's latency."""
    if devices == 1:
        return 0.0
    sent = 2 * (devices - 1) / devices * 4 * values
    return sent / links.bandwidth + 2 * math.log2(devices) * links.latency


def step_seconds(
    work: Work, devices: int, batch_per_device: int, flops_per_second: float, links: Links
) -> tuple[float, float]:
    """(compute, all-reduce); they overlap at best, and follow one another at worst."""
    compute = work.flops_per_example * batch_per_device / flops_per_second
    return compute, allreduce_seconds(work.reduced_values, devices, links)


def step_and_inputs(flags, devices: Sequence[jax.Device], batch_size: int, method="pmap"):
    """The step on the devices, and its inputs, as shapes."""
    model = models.MODELS[flags.model](
        num_classes=flags.classes, axis_name=parallel.AXIS, dtype=flags.dtype
    )
    pgd = partial(attacks.pgd, eps=8 / 255, num_steps=flags.num_steps, keep_best=False)
    objective = make_objective(
        apply_fn(model), loss=losses.cross_entropy, loss_on="adversarial", adversary=Adversary(pgd)
    )
    tx = optax.sgd(0.1, momentum=0.9)
    step = parallel.map_step(make_train_step(objective, tx), method, devices)
    key = jax.eval_shape(partial(jax.random.key, 0))
    state = jax.eval_shape(
        partial(init_state, model, tx, image_shape=flags.image, average=False), key
    )
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *flags.image), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        "position": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    return step, (state, batch, key)


def allreduced_bytes(program: str) -> int:
    """The bytes of every all-reduce in a compiled program; those in a loop's body count once."""
    total, bytes_of = 0, {"f32": 4, "bf16": 2}
    for line in program.splitlines():
        if found := re.search(r"= (.+?) all-reduce(?:-start)?\(", line):
            for kind, shape in re.findall(r"\b(f32|bf16)\[([\d,]*)\]", found[1]):
                total += bytes_of[kind] * math.prod(int(n) for n in shape.split(",") if n)
    return total


def reduced_values(state, sums) -> int:
    """Gradients, metrics, and BatchNorm's mean and mean square, forward and backward."""
    count = models.num_parameters
    return count(state.params) + count(sums) + 2 * count(state.batch_stats)


def cost_model(flags) -> None:
    """Prints the terms beside what CPU programs hold, and the predicted times."""
    step, (state, batch, key) = step_and_inputs(flags, jax.devices()[:1], flags.batch_per_device)
    sums = jax.eval_shape(step, state, batch, key)[1]
    flops = speed.flops(step, state, batch, key)
    work = Work(flops / flags.batch_per_device, reduced_values(state, sums))
    parameters = models.num_parameters(state.params)
    print(
        f"{flags.model}: {parameters:,} parameters, "
        f"{work.flops_per_example / 1e9:.3g} GFLOP an example and step\n"
    )

    columns = (
        "devices | GFLOP | MB all-reduced: model | program | MB of state: model | program "
        "| MB in use at most"
    )
    print(heading(columns))
    for devices in (1, 2, 4, 8):
        step, arguments = step_and_inputs(flags, jax.devices()[:devices], flags.batch_per_device)
        compiled = jax.jit(step).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        numbers = (
            flops / devices / 1e9,
            4 * work.reduced_values / 1e6,
            allreduced_bytes(compiled.as_text()) / 1e6,
            4 * (2 * parameters + models.num_parameters(state.batch_stats)) / 1e6,
            memory.output_size_in_bytes / 1e6,
            (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e6,
        )
        print(f"| {devices} | {' | '.join(f'{number:.4g}' for number in numbers)} |")

    links = Links(flags.bandwidth, flags.latency)
    rate = speed.PEAKS[flags.chip] * flags.share
    print(
        f"\n{flags.chip} at {flags.share:.0%} of its peak, {flags.batch_per_device} images each\n"
    )
    print(heading("devices | batch | compute, ms | all-reduce, ms | step, ms | efficiency"))
    for devices in (2**i for i in range(11)):
        compute, reduce = step_seconds(work, devices, flags.batch_per_device, rate, links)
        slowest = compute + reduce
        print(
            f"| {devices} | {devices * flags.batch_per_device:,} | {1e3 * compute:.3g} "
            f"| {1e3 * reduce:.3g} | {1e3 * max(compute, reduce):.3g} to {1e3 * slowest:.3g} "
            f"| {compute / slowest:.0%} |"
        )


def chips_of(topology: str) -> Sequence[jax.Device]:
    """The chips of a TPU's topology, for its compiler alone."""
    # Otherwise it would look for the machine that holds the chips.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return topologies.get_topology_desc(topology, "tpu").devices
    except RuntimeError as error:  # no such topology, or no compiler
        raise SystemExit(f"error: --tpu={topology}: {str(error).splitlines()[0]}") from None


def placed(tree, mesh: Mesh, *axes: str):
    """The shapes on the mesh, split along their first axis or not at all."""
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def compiled_for_tpu(flags) -> None:
    """Prints what the TPU's own compiler makes of the step on the chips of a topology."""
    devices = chips_of(flags.tpu)
    batch_size = flags.batch_per_device * len(devices)
    step, inputs = step_and_inputs(flags, devices, batch_size, "shard_map")
    mesh = Mesh(devices, (parallel.AXIS,))
    state, batch, key = inputs
    inputs = placed(state, mesh), placed(batch, mesh, parallel.AXIS), placed(key, mesh)
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(*inputs).compile()
    seconds = time.perf_counter() - started
    memory, program = compiled.memory_analysis(), compiled.as_text()
    convolutions = re.findall(r"= (\w+)\[[\d,]*\]\S* convolution\(", program)
    print(
        f"{flags.model} on {len(devices)} × {devices[0].device_kind} ({flags.tpu}), {batch_size} "
        f"images: compiled in {seconds:.0f} s\n"
        f"MB of a chip: {memory.argument_size_in_bytes / 1e6:.4g} of state and batch, "
        f"{memory.peak_memory_in_bytes / 1e6:.4g} in use at most, "
        f"{memory.generated_code_size_in_bytes / 1e6:.4g} of program\n"
        f"MB all-reduced: {allreduced_bytes(program) / 1e6:.4g}\n"
        f"convolutions: "
        + ", ".join(f"{convolutions.count(t)} to {t}" for t in sorted(set(convolutions)))
    )


# AutoAttack's members, one target or restart each as it runs them, and exact Jacobian norms.
ATTACKS = {
    **{
        name: partial(
            MEMBERS[name].attack,
            eps=8 / 255,
            **MEMBERS[name].keywords,
            **({"num_targets": 1} if name.endswith("_t") else {}),
        )
        for name in VERSIONS["standard"]
    },
    "frobenius_norm": lambda fn, x, y, keys: jacobian.frobenius_norm(fn, x),
}


def host_crossings(program: str) -> int:
    """How many instructions of a compiled program exchange data with the host."""
    lines = program.splitlines()
    return sum(bool(re.search(r" (in|out)feed\(|is_host_transfer=true", line)) for line in lines)


def attacks_compiled_for_tpu(flags) -> None:
    """Prints what the TPU's own compiler makes of AutoAttack and Jacobians on those chips."""
    devices = chips_of(flags.tpu)
    mesh, batch_size = Mesh(devices, (parallel.AXIS,)), flags.batch_per_device * len(devices)
    model = models.MODELS[flags.model](num_classes=flags.classes, dtype=flags.dtype)
    image = jax.ShapeDtypeStruct((batch_size, *flags.image), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    rows = image, jax.ShapeDtypeStruct((batch_size,), jnp.int32), keys
    inputs = placed(variables, mesh), *placed(rows, mesh, parallel.AXIS)
    print(f"{flags.model} on {len(devices)} × {devices[0].device_kind}, {batch_size} images\n")
    columns = (
        "program | compiled in, s | TFLOP an image | MB of a chip in use at most "
        "| exchanges with the host"
    )
    print(heading(columns), flush=True)
    for name, attack in ATTACKS.items():

        def run(variables, x, y, keys, attack=attack):
            return attack(partial(network(model), variables), x, y, keys)

        shares = (PartitionSpec(parallel.AXIS),) * 3
        mapped = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(PartitionSpec(), *shares),
            out_specs=shares[0],
            check_vma=False,
        )
        started = time.perf_counter()
        compiled = jax.jit(mapped).lower(*inputs).compile()
        seconds = time.perf_counter() - started
        flops = speed.flops(run, variables, *rows) / batch_size
        peak = compiled.memory_analysis().peak_memory_in_bytes
        print(
            f"| {name} | {seconds:.0f} | {flops / 1e12:.3g} | {peak / 1e6:.4g} "
            f"| {host_crossings(compiled.as_text())} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="preact_resnet", choices=models.MODELS)
    parser.add_argument(
        "--image", default=(32, 32, 3), type=lambda text: tuple(map(int, text.split(",")))
    )
    parser.add_argument("--classes", default=10, type=int)
    parser.add_argument("--num_steps", default=10, type=int, help="of PGD")
    parser.add_argument("--batch_per_device", default=128, type=int)
    parser.add_argument("--chip", default="NVIDIA H200", choices=speed.PEAKS)
    parser.add_argument("--share", default=0.3, type=float, help="of the chip's peak")
    parser.add_argument(
        "--bandwidth", default=50e9, type=float, help="of a device's links, bytes/s"
    )
    parser.add_argument("--latency", default=1e-5, type=float, help="of a message, seconds")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--tpu", help="a topology, such as v5e:2x2: compile for it, and that is all"
    )
    parser.add_argument(
        "--work", default="step", choices=("step", "attacks"), help="what a TPU's compiler gets"
    )
    flags = parser.parse_args()
    if flags.work == "attacks" and not flags.tpu:
        parser.error("--work=attacks needs --tpu")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    if flags.tpu:
        (attacks_compiled_for_tpu if flags.work == "attacks" else compiled_for_tpu)(flags)
    else:
        cost_model(flags)


if __name__ == "__main__":
    main()
