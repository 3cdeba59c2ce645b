"""One model in several threads, tasks and hooks at once: every call sees its own positions, hooks, edits and caches."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer

import writesae as ws
from architectures import N_VOCAB, Architecture, each_architecture

SHIPPED = ("tiny-gdn", "tiny-mamba2", "tiny-rwkv7")
V = "blocks.1.mixer.hook_v"


@pytest.fixture(scope="module", params=SHIPPED)
def model(request: pytest.FixtureRequest) -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel.from_pretrained(request.param)


@pytest.fixture
def tiny(architecture: Architecture) -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel(architecture.build())


def in_a_thread(fn: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn).result()


def side_by_side(model: ws.HookedRecurrentModel, *calls: Callable[[], Any]) -> list[Any]:
    """What calls give that run in threads at once, each waiting for the others in the middle of its pass."""
    barrier = threading.Barrier(len(calls), timeout=60)

    def meet(value: Tensor, hook: Any) -> None:
        barrier.wait()

    def meeting(call: Callable[[], Any]) -> Any:
        with model.hooks([("blocks.1.hook_resid_pre", meet)]):
            return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(meeting, calls))


# Each call its own ----------------------------------------------------------------------------------------------------


@each_architecture
@torch.no_grad()
def test_calls_that_run_at_once(architecture: Architecture, tiny: ws.HookedRecurrentModel) -> None:
    """Of other length, padding, edits, positions and hooks."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    short, long, padded = (torch.randint(N_VOCAB, size) for size in ((1, 5), (3, 12), (2, 9)))

    def cached() -> list[Tensor]:
        logits, cache = tiny.run_with_cache(
            long, lambda name: name.startswith("blocks.1.mixer") and "state" not in name
        )
        return [logits, cache[V], cache.positions, cache.state(1, [3])]

    def edited() -> list[Tensor]:
        with tiny.intervene(ws.Delete(1, 0), positions=[2]), tiny.intervene(ws.Delete(3, 1), positions=[4]):
            return [tiny(short)]

    def hooked() -> list[Tensor]:
        return [tiny.run_with_hooks(padded, [(V, lambda value, hook: 2 * value)], attention_mask=mask)]

    def by_state() -> list[Tensor]:
        seen: list[Tensor] = []
        with tiny.hooks(
            [("blocks.1.mixer.hook_state", lambda state, hook: seen.append(hook.positions) or 0.5 * state)],
            state_positions=[1, 7],
        ):
            return [tiny(long), *seen]

    calls = (cached, edited, hooked, by_state)
    alone = [call() for call in calls]
    for found, expected in zip(side_by_side(tiny, *calls), alone, strict=True):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
    # The twin: what everybody's calls share, the edit of a block in the main thread, moves all of them.
    with tiny.intervene(ws.Delete(1)):
        for found, expected in zip(side_by_side(tiny, *calls), alone, strict=True):
            assert (found[0] - expected[0]).abs().max() > 1e-4


@torch.no_grad()
def test_many_threads(model: ws.HookedRecurrentModel) -> None:
    ids = [torch.randint(100, 500, (1 + i % 3, 5 + i % 17)) for i in range(80)]

    def call(i: int) -> list[Tensor]:
        logits, cache = model.run_with_cache(ids[i], V)
        with model.intervene(ws.Delete(1, i % 2), positions=[i % 5]), model.intervene(ws.Delete(2), positions=[2, 3]):
            edited = model(ids[i])
        return [logits, cache[V], cache.positions, edited]

    def on(i: int) -> list[Tensor]:
        with model.intervene(ws.Delete(1, i % 2), positions=[i % 5]):
            return [model.generate(ids[i][:1], max_new_tokens=4, do_sample=False)]

    for fn, n in ((call, 80), (on, 16)):
        expected = [fn(i) for i in range(n)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(fn, range(n)))
        wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not all(map(torch.equal, a, b))]
        assert wrong == []


@torch.no_grad()
def test_stopping_early_stops_nobody_else(model: ws.HookedRecurrentModel) -> None:
    ids = torch.randint(100, 500, (1, 12))
    whole, part = model(ids), model(ids, stop_at_layer=2)
    found = side_by_side(model, lambda: model(ids, stop_at_layer=2), lambda: model(ids))
    assert torch.equal(found[0], part) and torch.equal(found[1], whole)


@torch.no_grad()
def test_a_cache_holds_its_own_call_alone(model: ws.HookedRecurrentModel) -> None:
    """Also one of the main thread, while others run; a hook for everybody, the twin, sees them."""
    ids, other = torch.randint(100, 500, (1, 12)), torch.randint(100, 500, (1, 5))
    seen: list[int] = []

    def run_another(value: Tensor, hook: Any) -> None:
        in_a_thread(lambda: model(other))

    expected = model.run_with_cache(ids, [V])[1][V]
    model.add_hook(V, lambda value, hook: seen.append(value.shape[1]))
    try:
        recorded = []
        hooks = [("blocks.1.hook_resid_pre", run_another), (V, lambda value, hook: recorded.append(value))]
        model.run_with_hooks(ids, hooks)
    finally:
        model.reset_hooks()
    assert len(recorded) == 1 and torch.equal(recorded[0], expected)
    assert sorted(seen) == [5, 12]


@each_architecture
@torch.no_grad()
def test_a_hook_that_runs_the_same_model(architecture: Architecture, tiny: ws.HookedRecurrentModel) -> None:
    """Positions, padding and edits of the outer pass go on as they were, wherever the inner one ran."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    ids, other = torch.randint(N_VOCAB, (2, 9)), torch.randint(N_VOCAB, (1, 4))
    edits = [ws.Delete(layer, 1) for layer in architecture.layers]
    inner: list[Tensor] = []

    def nested(value: Any, hook: Any) -> None:
        if not inner:
            inner.append(torch.empty(0))  # in the inner pass it is called again
            inner[0] = tiny.hf_model(other, use_cache=False).logits

    plain = tiny(other)
    with tiny.intervene(edits, positions=[2]):
        expected, of_other = tiny(ids, attention_mask=mask), tiny(other)
        places = [f"blocks.1.mixer.hook_{q}" for q in architecture.quantities(1) if q != "state"]
        for place in ("blocks.1.hook_resid_pre", *places, "blocks.1.hook_resid_post"):
            inner.clear()
            found = tiny.run_with_hooks(ids, [(place, nested)], attention_mask=mask)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=place)
            torch.testing.assert_close(inner[0], of_other, rtol=0, atol=0)
        inner.clear()  # a hook that is not ours
        handle = tiny.hf_model.get_submodule(
            next(n for n, _ in tiny.hf_model.named_modules() if n.endswith(f"{architecture.stack}.1"))
        )
        with handle.register_forward_pre_hook(nested):
            torch.testing.assert_close(tiny(ids, attention_mask=mask), expected, rtol=0, atol=0)
    assert (of_other - plain).abs().max() > 1e-4  # the twin: edits act in the inner pass, too


# For whom a block acts ------------------------------------------------------------------------------------------------


def test_a_block_of_the_main_thread_acts_in_every_thread(model: ws.HookedRecurrentModel) -> None:
    """As when `generate` runs in a thread of its own and a streamer hands out the text."""
    text = "The state of the Union"
    streamer = TextIteratorStreamer(model.tokenizer)
    settings = dict(max_new_tokens=6, do_sample=False)
    with model.intervene(ws.Delete(1)):
        expected = model.generate(text, **settings)
        thread = threading.Thread(target=model.generate, args=(text,), kwargs=dict(settings, streamer=streamer))
        thread.start()
        assert "".join(streamer) == expected
        thread.join()
    assert model.generate(text, **settings) != expected


@torch.no_grad()
def test_a_block_of_another_thread_acts_there_alone(model: ws.HookedRecurrentModel) -> None:
    ids = torch.randint(100, 500, (1, 12))
    plain = model(ids)

    def block() -> tuple[Tensor, Tensor, Tensor]:
        with model.intervene(ws.Delete(1)):
            own = model(ids)
            context = contextvars.copy_context()
            return own, in_a_thread(lambda: model(ids)), in_a_thread(lambda: context.run(lambda: model(ids)))

    own, others, followed = in_a_thread(block)
    assert torch.equal(others, plain)
    assert torch.equal(own, followed) and (own - plain).abs().max() > 1e-3


@torch.no_grad()
def test_a_block_that_acts_nowhere_is_not_silent(model: ws.HookedRecurrentModel) -> None:
    ids = torch.randint(100, 500, (1, 12))

    def block(inside: Callable[[], Any]) -> None:
        with model.intervene(ws.Delete(1)):
            inside()

    with pytest.warns(UserWarning, match="only in threads in which what the block attached does not act"):
        in_a_thread(lambda: block(lambda: in_a_thread(lambda: model(ids))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_a_thread(lambda: block(lambda: model(ids)))
        in_a_thread(lambda: block(lambda: None))


@torch.no_grad()
def test_tasks_of_a_server(model: ws.HookedRecurrentModel) -> None:
    """Requests that wait for each other, each with edits of its own, or none."""
    ids = torch.randint(100, 500, (1, 12))

    def edited(layer: int) -> Tensor:
        with model.intervene(ws.Delete(layer)):
            return model(ids)

    expected = [edited(0), edited(1), model(ids)]

    async def serve() -> list[Tensor]:
        ready = asyncio.Barrier(3)

        async def request(layer: int | None) -> Tensor:
            if layer is None:
                await ready.wait()
                return await asyncio.to_thread(lambda: model(ids))
            with model.intervene(ws.Delete(layer)):
                await ready.wait()
                here = model(ids)
                there = await asyncio.to_thread(lambda: model(ids))
                assert torch.equal(here, there)
                return here

        return await asyncio.gather(request(0), request(1), request(None))

    found = asyncio.run(serve())
    assert [torch.equal(x, y) for x, y in zip(found, expected, strict=True)] == [True] * 3
    assert not torch.equal(expected[0], expected[1])


def test_a_copy_made_in_a_block_is_edited_until_the_block_ends(model: ws.HookedRecurrentModel) -> None:
    ids = torch.randint(100, 500, (1, 12))
    with torch.no_grad():
        plain = model(ids)
        with model.intervene(ws.Delete(1)), model.hooks([(V, lambda value, hook: 2 * value)]):
            other, edited = copy.deepcopy(model), model(ids)
            assert torch.equal(other(ids), edited)
        assert torch.equal(other(ids), plain) and not torch.equal(edited, plain)


# Layers that run again ------------------------------------------------------------------------------------------------


def checkpointed(edit: Callable[[ws.HookedRecurrentModel], Any], backward: Callable[..., Any]) -> Tensor:
    """The gradient of an embedding, layers run again in the backward pass, under edits."""
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    model.hf_model.train()
    model.hf_model.activation_checkpointing_enable({"use_reentrant": False})
    with edit(model):
        loss = model(torch.arange(100, 112)[None])[0, -1, 7]
        backward(loss.backward)
    return model.W_E.grad if model.W_E.grad is not None else model.hf_model.get_input_embeddings().weight.grad


def test_layers_that_run_again_in_another_thread() -> None:
    """As torch does on a GPU: they find the pass, if only one thread runs the model; an edit they cannot see is an
    error."""
    deleting = lambda model: model.intervene(ws.Delete(1), positions=[3])  # noqa: E731
    expected = checkpointed(deleting, lambda backward: backward())
    found = checkpointed(deleting, in_a_thread)
    assert torch.equal(found, expected)
    none = checkpointed(lambda model: model.intervene([]), lambda backward: backward())
    assert not torch.equal(none, expected)  # the twin
    with pytest.raises(RuntimeError, match="layers run again in another thread"):
        in_a_thread(lambda: checkpointed(deleting, in_a_thread))


def test_layers_that_run_where_no_pass_began(model: ws.HookedRecurrentModel) -> None:
    """Whose pass that is cannot be known once several threads have run the model."""
    model, ids = copy.deepcopy(model), torch.randint(100, 500, (1, 12))
    in_a_thread(lambda: model.run_with_cache(ids, V))
    assert in_a_thread(model.taps[1].clock.positions).tolist() == [list(range(12))]
    model(ids)
    with pytest.raises(RuntimeError, match="several threads have run"):
        in_a_thread(model.taps[1].clock.positions)
