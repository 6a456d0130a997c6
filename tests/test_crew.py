"""Several processes on the CPU: they give the same losses and weights as one process alone.

A run can go on with as many processes as before, or with another number of them. It ends when one
of them dies.
"""
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command, read_lines

import model as llama
import selfplay
from support import console, learning, machine, runs

# Two updates on given games, with two ways of adding up: by two processes, by four, and by one
# alone. All are forked from this one, which saves the time to start them. The environment tells
# them the same as torchrun would. Losses and weights are written to a folder.
UPDATE = """
import copy, os, sys, traceback
import torch, torch.distributed as dist
import torch.distributed.device_mesh, torch.distributed.fsdp
import model as llama, selfplay
from support import learning, machine

torch.set_num_threads(1)
args = selfplay.parse_args([
    "--model", sys.argv[1], "--device", "cpu", "--queries", "8", "--answers", "4", "--kl", "0.1",
    "--micro-batch", "96"])
tiny, tokenizer = llama.load(args.model)
nothing = dict.fromkeys(selfplay.Game._fields)
game = selfplay.Game(**nothing | {
    "model": tiny, "tokenizer": tokenizer, "prompt": selfplay.challenger_prompt(tokenizer),
    "generator": torch.Generator().manual_seed(5), "crew": machine.Crew()})
queries, answers, challenger, solver = selfplay.play(game, args)  # all will have these games
torch.manual_seed(0)
reward, quality = torch.rand(8, 4), torch.rand(8, 4)


def updates(aggregate):
    crew, device = machine.join("cpu")
    model, reference = copy.deepcopy(tiny), copy.deepcopy(tiny).requires_grad_(False)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.01)
    if crew.size > 1:  # both compute in float32, on the CPU
        machine.shard(model)
        machine.shard(reference)
    # As each of them would have played its own queries: see selfplay.play.
    asked = challenger._replace(prompts=challenger.prompts * crew.size, completions=llama.groups(
        challenger.completions[0], args.queries // crew.size))
    selfplay.play = lambda game, args: (queries, answers, asked, solver)
    own = game._replace(
        model=model, reference=reference, crew=crew,
        optimizer=learning.optimizer_for(model, torch.optim.SGD, lr=0.1),
        referee=lambda q, a: crew.share(reward), judge=lambda q, a: crew.share(quality))
    args.aggregate = aggregate
    for _ in range(2):
        step = selfplay.step(own, args)
    folder = f"{crew.size}-{aggregate}"
    llama.save(model, folder)
    if not crew.rank:
        assert torch.equal(step.reward, reward) and torch.equal(step.quality, quality)
        figures = {(who, name): value for who, terms in step.losses.items()
                   for name, value in terms.items()}
        torch.save(figures | {"norm": step.norm}, folder + "/figures.pt")
    machine.leave(crew)


# One of several ends by os._exit, as run_command ends it, too.
children = []
for size in (2, 4):
    for aggregate in ("sum", "token"):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(size):
            children.append(os.fork())
            if not children[-1]:
                os.environ |= {
                    "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
                try:
                    updates(aggregate)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
        for child in children[-size:]:
            if os.waitpid(child, 0)[1]:
                sys.exit(1)
for aggregate in ("sum", "token"):
    updates(aggregate)
"""
