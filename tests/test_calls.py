"""What one forward pass knows stays with that pass: threads, failures, nesting, generation, checkpoints, replicas."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from lightning_peft import Method, PrefixTuning, PromptTuning, PTuning, inject
from lightning_peft.prompting.call import Call, Calls
from lightning_peft.prompting.virtual import InsertedTokens
from tests.grid import GRID, VOCAB

TOKENS = 3


def adapted(name: str, method: Method, attention: str = "sdpa") -> nn.Module:
    model = GRID[name].make(attention)
    inject(model, method)
    return model


def tokens_of(model: nn.Module) -> Any:
    """The state of the adapted embedding."""
    states = [getattr(module, "_adapter", None) for module in model.modules()]
    return next(state for state in states if isinstance(state, InsertedTokens))


def labelled(text_length: int) -> dict[str, torch.Tensor]:
    """A row of nine tokens whose labels begin behind the text."""
    ids = torch.arange(4, 13)[None]
    labels = ids.clone()
    labels[:, :text_length] = -100
    return {"input_ids": ids, "labels": labels}


def marked(columns: list[int]) -> dict[str, torch.Tensor]:
    """A batch for LLaVA with placeholders in these columns of every row."""
    batch = GRID["llava"].batch()
    batch["input_ids"][:, columns] = VOCAB
    return batch


def at_once(meeting_point: nn.Module, *passes: Callable[[], Any]) -> list[Any]:
    """Results of passes in threads of their own, which wait for each other inside one module."""
    barrier = threading.Barrier(len(passes), timeout=60)
    results: list[Any] = [None] * len(passes)

    def wait(module: nn.Module, args: tuple[Any, ...]) -> None:
        barrier.wait()

    def run(place: int) -> None:
        with torch.no_grad():
            try:
                results[place] = passes[place]()
            except Exception as error:
                barrier.abort()
                results[place] = error

    handle = meeting_point.register_forward_pre_hook(wait)
    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(passes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    return results


# ---- threads -------------------------------------------------------------------------------------------------------
def passes_of(name: str, model: nn.Module) -> tuple[nn.Module, list[Callable[[], torch.Tensor]]]:
    """A module inside, and two passes of different lengths, labels or placeholders."""
    if name == "llama":
        passes = [lambda: model(**labelled(3)).logits, lambda: model(**labelled(6)).logits]
        return model.model.norm, passes
    if name == "llava":
        passes = [lambda: model(**marked([0, 5, 7])).logits, lambda: model(**GRID["llava"].batch()).logits]
        return model.model.language_model.norm, passes
    if name == "vit":
        pixels = GRID["vit"].batch(rows=2)["pixel_values"]
        passes = [lambda: model(pixels).pooler_output, lambda: model(pixels[:1]).pooler_output]
        return model.layernorm, passes
    batch = GRID["t5"].batch()
    short = {key: value[:1, :5] for key, value in batch.items()}

    def cross_attentions(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**inputs, output_attentions=True).cross_attentions[-1]

    return model.decoder.final_layer_norm, [lambda: cross_attentions(batch), lambda: cross_attentions(short)]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", PromptTuning(TOKENS, position="append", init="random")),
        ("llava", PTuning(TOKENS)),
        ("vit", PromptTuning(TOKENS)),
        ("t5", PromptTuning(TOKENS, init="random")),
    ],
    ids=["llama", "llava", "vit", "t5"],
)
def test_threads_have_calls_of_their_own(name, method):
    model = adapted(name, method, "eager" if name == "t5" else "sdpa")
    meeting_point, passes = passes_of(name, model)
    with torch.no_grad():
        expected = [run() for run in passes]
    for result, alone in zip(at_once(meeting_point, *passes), expected, strict=True):
        assert not isinstance(result, Exception), result
        torch.testing.assert_close(result, alone)


def test_threads_generate_side_by_side():
    """An appended prompt stands behind each thread's own text."""
    model = adapted("llama", PromptTuning(TOKENS, position="append", init="random"))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    texts = [torch.arange(4, 9)[None], torch.arange(4, 12)[None]]
    passes = [lambda text=text: model.generate(text, **options) for text in texts]
    expected = [run() for run in passes]
    for result, alone in zip(at_once(model.model.norm, *passes), expected, strict=True):
        assert torch.equal(result, alone)


def test_threads_count_their_own_cache():
    """T5's position bias between queries and prefix depends on how many tokens the cache of the pass holds."""
    model = adapted("t5", PrefixTuning(TOKENS, init_std=1.0))
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    batch = GRID["t5"].batch()
    batch.pop("decoder_input_ids")
    starts = [torch.zeros(2, 1, dtype=torch.long), torch.tensor([[0, 7, 8, 9], [0, 9, 8, 7]])]

    def generate(start: torch.Tensor) -> torch.Tensor:
        out = model.generate(**batch, decoder_input_ids=start, return_dict_in_generate=True, **options)
        return torch.stack(out.logits)

    passes = [lambda start=start: generate(start) for start in starts]
    expected = [run() for run in passes]
    inside = model.decoder.block[0].layer[0].SelfAttention.q
    for result, alone in zip(at_once(inside, *passes), expected, strict=True):
        torch.testing.assert_close(result, alone)


# ---- failures ------------------------------------------------------------------------------------------------------
def fail_once(module: nn.Module, run: Callable[[], Any]) -> None:
    """Run a pass in which a module raises."""
    handle = module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    handle.remove()


def test_labels_of_a_failed_pass_are_forgotten():
    model = adapted("llama", PromptTuning(TOKENS, position="append", init="random"))
    ids = labelled(3)["input_ids"]
    expected = model.model(ids).last_hidden_state
    fail_once(model.model.layers[1], lambda: model(**labelled(3)))
    assert tokens_of(model).calls.current() is None
    torch.testing.assert_close(model.model(ids).last_hidden_state, expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other.model(ids).last_hidden_state, expected)


def test_placeholders_of_a_failed_pass_are_forgotten():
    """The ids were looked up, and the backbone, which would have asked for them, was never reached."""
    model = adapted("llava", PTuning(TOKENS))
    embeds = torch.randn(1, 6, 32)
    expected = model.model.language_model(inputs_embeds=embeds).last_hidden_state
    fail_once(model.model.vision_tower, lambda: model(**marked([0, 5, 7])))
    torch.testing.assert_close(model.model.language_model(inputs_embeds=embeds).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["vit", "t5", "bert"])
def test_a_failed_pass_leaves_nothing(name):
    kind, model = GRID[name], adapted(name, PromptTuning(TOKENS, init="random"))
    expected = kind.output(model)
    inside = {"vit": "layers.1", "t5": "decoder.block.1", "bert": "encoder.layer.1"}[name]
    fail_once(model.get_submodule(inside), lambda: kind.output(model))
    assert tokens_of(model).calls.current() is None
    assert torch.equal(kind.output(model), expected)


def test_embeddings_made_before_the_model_is_called():
    """Placeholders that the caller has embedded himself are there already, once."""
    model = adapted("bert", PTuning(TOKENS))
    batch = GRID["bert"].batch()
    batch["input_ids"][:, [1, 2, 4]] = VOCAB
    expected = GRID["bert"].run(model, batch)
    embedding = model.get_input_embeddings()
    by_hand = {"inputs_embeds": embedding(batch["input_ids"]) * 1.0, "attention_mask": batch["attention_mask"]}
    torch.testing.assert_close(GRID["bert"].run(model, by_hand), expected)
    plain = {"inputs_embeds": torch.randn(2, 9, 32), "attention_mask": batch["attention_mask"]}
    lengths = []
    model.encoder.layer[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    GRID["bert"].run(model, plain)
    assert lengths == [9 + TOKENS]


# ---- nested passes -------------------------------------------------------------------------------------------------
def call_inside(module: nn.Module, run: Callable[[], Any]) -> None:
    """Let a module make one further pass before its own next one."""

    def once(*_: Any) -> None:
        handle.remove()
        run()

    handle = module.register_forward_pre_hook(once)


@pytest.mark.parametrize("inner", ["model", "backbone"])
def test_a_pass_inside_a_pass(inner):
    model = adapted("llama", PromptTuning(TOKENS, position="append", init="random"))
    other = {"model": lambda: model(**labelled(6)), "backbone": lambda: model.model(torch.arange(4, 9)[None])}[inner]
    expected = model(**labelled(3)).logits
    call_inside(model.model.layers[1], other)
    torch.testing.assert_close(model(**labelled(3)).logits, expected)


def test_another_adapted_model_inside():
    outer = adapted("llama", PromptTuning(TOKENS, position="append", init="random"))
    teacher = adapted("llama", PromptTuning(5, init="random"))
    expected = outer(**labelled(3)).logits
    call_inside(outer.model.layers[1], lambda: teacher(labelled(3)["input_ids"]))
    torch.testing.assert_close(outer(**labelled(3)).logits, expected)


# ---- checkpoints and replicas --------------------------------------------------------------------------------------
def test_a_checkpointed_backbone_knows_the_labels_again():
    """Its hooks run once more in the backward pass, when the model around it has returned.

    The reentrant kind of checkpoint gives no gradient through the mapping that a backbone returns.
    """
    gradients = []
    for on in (False, True):
        model = adapted("llama", PromptTuning(TOKENS, position="append", init="random"))
        prompt = model.get_input_embeddings().delta.prompt
        if on:
            model.model = checkpoint_wrapper(model.model, CheckpointImpl.NO_REENTRANT)
        model(**labelled(3), use_cache=False).loss.backward()
        gradients.append(prompt.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


class LastRealToken:
    """A change at the last real token of each row, as ReFT makes it: a hook inside a layer that reads the call."""

    def __init__(self, calls: Calls, width: int) -> None:
        self.calls = calls
        self.change = nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(1)))
        self.seen: list[Call | None] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        call = self.calls.current()
        self.seen.append(call)
        assert call is not None and call.insertion is not None
        last = torch.as_tensor(call.row_ends(call.length)) - 1 + call.insertion.count
        columns = torch.arange(output.shape[1])
        return output + (columns == last).unsqueeze(-1) * self.change


@pytest.mark.parametrize("reentrant", [True, False])
def test_hooks_inside_checkpointed_layers_find_their_own_call(reentrant):
    """Two passes of different lengths, differentiated together: each layer is run again with the facts of its pass."""
    gradients = []
    for on in (False, True):
        model = adapted("bert", PromptTuning(TOKENS, init="random"))
        hook = LastRealToken(tokens_of(model).calls, 32)
        model.encoder.layer[0].attention.output.register_forward_hook(hook)
        if on:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # of the layers
        batch = GRID["bert"].batch()
        short = {key: value[1:, :6] for key, value in batch.items()}
        first, second = model(**batch).last_hidden_state, model(**short).last_hidden_state
        assert tokens_of(model).calls.current() is None
        (first[:, 0].square().mean() + second.square().mean()).backward()
        gradients.append((hook.change.grad, model.get_input_embeddings().delta.prompt.grad))
        assert len(hook.seen) == (4 if on else 2) and len(set(map(id, hook.seen))) == 2
        assert tokens_of(model).calls.current() is None
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_graph_alone_keeps_a_call():
    """It goes with the output that it belongs to."""
    model = adapted("bert", PromptTuning(TOKENS, init="random"))
    calls = tokens_of(model).calls
    out = model(**GRID["bert"].batch()).last_hidden_state
    out.sum().backward()
    assert len(calls._differentiated) == 1
    del out
    assert not calls._differentiated and not calls._running
    with torch.no_grad():
        model(**GRID["bert"].batch())
    assert not calls._differentiated and not calls._running


def replica_of(model: nn.Module) -> nn.Module:
    """What `nn.DataParallel` makes for a device: parameters become plain tensors of copies."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    tensors = {tensor: tensor.clone() for tensor in (*model.parameters(), *model.buffers())}
    for module, replica in copies.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            if child is not None:
                setattr(replica, name, copies[child])
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, tensors[tensor])
    return copies[model]


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize(
    "method", [PromptTuning(TOKENS, init="random"), PTuning(TOKENS), PrefixTuning(TOKENS, init_std=1.0)]
)
def test_a_replica_computes_with_its_own_vectors(method, embedded):
    """They are on its own device; the original's are not."""
    model = adapted("llama", method)
    inputs = {"input_ids": labelled(3)["input_ids"]}
    if embedded:
        inputs = {"inputs_embeds": model.model.embed_tokens.weight[inputs["input_ids"]].detach()}
    expected = model(**inputs).logits
    replica = replica_of(model)
    for name, parameter in model.named_parameters():
        if ".delta." in name:
            parameter.data.fill_(torch.nan)
    torch.testing.assert_close(replica(**inputs).logits, expected)
