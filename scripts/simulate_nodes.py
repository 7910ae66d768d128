"""Losses of nodes in a job of the batch command, simulated: images repeated, hours lost, and time until the last one.

    python scripts/simulate_nodes.py [--nodes 100] [--images 1000000] [--rate 32] [--task 16] [--lost-per-hour 0.05]

Every node runs as many actors as it has cores. An actor takes a task of some images, enlarges one after the other and
hands all rows in at the end; outputs appear one by one. When a node is lost, its actors' tasks go back into the queue,
and a new node comes after a while. A task that is repeated makes its images once more, except those whose outputs lie
there already, which it only looks up; --no-lookup counts them in full. Nodes are lost at random times, independently of
each other (a Poisson process), which is the usual model of spot capacity. Rates of nodes are yours to give: measure
images per second with 'onestepsr batch'.
"""

from __future__ import annotations

import argparse
import heapq
import random


def simulate(
    *,
    nodes: int,
    cores: int,
    images: int,
    rate: float,
    task: int,
    lost_per_hour: float,
    back_after: float,
    lookup: float | None,
    seed: int,
) -> dict[str, float]:
    """One run; ``rate`` in images per second of a node, times in seconds. Returns totals."""
    rng = random.Random(seed)
    each = cores / rate  # seconds of one image on one core
    waiting = [0] * -(-images // task)  # outputs of each task that lie there already
    events: list[tuple[float, int, str, int, int]] = []  # time, order, kind, node, its generation
    generation = [0] * nodes
    running: list[dict[int, tuple[float, int]]] = [{} for _ in range(nodes)]  # actor -> start, outputs found
    order = repeated = lookups = losses = done = 0
    now, up = 0.0, float(nodes)
    node_seconds = 0.0

    def push(when: float, kind: str, node: int, actor: int) -> None:
        nonlocal order
        order += 1
        heapq.heappush(events, (when, order, f"{kind}:{generation[node]}", node, actor))

    def start(node: int, actor: int) -> None:
        if waiting:
            found = waiting.pop()
            running[node][actor] = (now, found)
            push(now + found * (lookup or each) + (task - found) * each, "end", node, actor)

    for node in range(nodes):
        push(rng.expovariate(lost_per_hour / 3600) if lost_per_hour else float("inf"), "lost", node, 0)
        for actor in range(cores):
            start(node, actor)
    tasks = len(waiting) + sum(map(len, running))
    while done < tasks:
        when, _, tag, node, actor = heapq.heappop(events)
        kind, _, number = tag.partition(":")
        if int(number) != generation[node]:
            continue
        node_seconds += up * (when - now)
        now = when
        if kind == "end":
            _, found = running[node].pop(actor)
            done += 1
            start(node, actor)
        elif kind == "lost":
            losses += 1
            up -= 1
            generation[node] += 1
            for begun, found in running[node].values():
                passed = now - begun - found * (lookup or each)
                made = min(task, found + max(0, int(passed / each)))
                waiting.append(made if lookup is not None else 0)
                repeated += 1 if lookup is not None else made + 1  # the one in work, or all of the task
                lookups += made if lookup is not None else 0
            running[node].clear()
            push(now + back_after, "back", node, 0)
        else:
            up += 1
            push(now + rng.expovariate(lost_per_hour / 3600), "lost", node, 0)
            for own in range(cores):
                start(node, own)
    ideal = images / (rate * nodes)
    return {"losses": losses, "repeated": repeated, "lookups": lookups, "hours": now / 3600, "ideal": ideal / 3600}


def main() -> None:
    """Simulate several rates of loss and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--cores", type=int, default=8)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=1.0, help="images per second of one node")
    parser.add_argument("--task", type=int, nargs="*", default=[16, 256])
    parser.add_argument("--lost-per-hour", type=float, nargs="*", default=[0.0, 0.05, 0.5, 2.0], help="of one node")
    parser.add_argument("--back-after", type=float, default=180.0, help="seconds until a new node works")
    parser.add_argument("--lookup", type=float, default=0.02, help="seconds to find that an output is there")
    parser.add_argument("--no-lookup", action="store_true", help="make all images of a repeated task again")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| images per task | lost per node and hour | lost | images made twice | of all | hours | without losses |")
    print("|---|---|---|---|---|---|---|")
    for task in arguments.task:
        for lost in arguments.lost_per_hour:
            found = simulate(
                nodes=arguments.nodes,
                cores=arguments.cores,
                images=arguments.images,
                rate=arguments.rate,
                task=task,
                lost_per_hour=lost,
                back_after=arguments.back_after,
                lookup=None if arguments.no_lookup else arguments.lookup,
                seed=arguments.seed,
            )
            share = found["repeated"] / arguments.images
            print(
                f"| {task} | {lost:g} | {found['losses']:,} | {found['repeated']:,} | {share:.3%} "
                f"| {found['hours']:.2f} | {found['ideal']:.2f} |"
            )


if __name__ == "__main__":
    main()
