"""Mistakes that a newcomer makes, and what is said of them: what was given, what is allowed, and the fix.

They are made in a process of their own, where no type checker stands in front of the package.
"""

import json
import os
import subprocess
import sys

import pytest

MISTAKES = {
    "ws.replacement_test(sae, model, [text])": [
        "model must be a HookedRecurrentModel",
        "WriteSAE",
        "(model, sae, text",
    ],
    "ws.attribute(text, model)": ["model must be a HookedRecurrentModel", "attribute(model, text, token"],
    "ws.attribute(model, text, sae)": ["a token is a text of one token", "WriteSAE"],
    "ws.evaluate(sae, model, [text])": ["got a WriteSAE", "evaluate(model, saes, texts"],
    "ws.write_pages(sae, model, 'x')": ["write_pages(model, sae, texts, out"],
    "ws.top_contexts(sae, model, [text], 3)": ["too many positional arguments", "top_contexts(model, sae, texts, *, n"],
    "ws.pattern(text, model, 2, 0)": ["model must be a HookedRecurrentModel", "pattern(model, text, layer, head"],
    "model.encode(text, sae)": ["sae must be an SAE", "encode(sae, x"],
    "sae.encode(text)": ["an SAE reads matrices", "model.encode(sae, text)"],
    "sae.decode(text)": ["decode takes activations"],
    "sae.atom('53')": ["whole number"],
    "ws.Knockout(2, 1, source=5, targets=9)": ["no argument 'source': Knockout(layer, head", "did you mean 'sources'?"],
    "ws.Delete(layers=2)": ["no argument 'layers'", "did you mean 'layer'?"],
    "ws.Substitute(sae, atoms=[5])": ["no argument 'atoms'", "did you mean 'atom'?"],
    "ws.Substitute(sae, atom=[5, 9999])": ["atom 9999: this SAE has atoms 0 to 2047"],
    "ws.Replace(2, 1, write=torch.zeros(3))": ["write= is a Write", "got a Tensor"],
    "ws.Add(2, 1, write=cache.write(2)[0, 5, 1], scale='3')": ["scale='3': give a number"],
    "edited(ws.Delete(2, 1), position=[5])": ["argument 'position'", "did you mean 'positions'?"],
    "edited(sae, atoms=7)": ["argument 'atoms'", "did you mean 'atom'?"],
    "edited(sae, atom=7, scale='3')": ["scale='3': give a number"],
    "model.memory(text, memories=None)": ["argument 'memories'", "did you mean 'memory'?"],
    "model.run_with_hooks(text, ['blocks.2.mixer.hook_k'])": ["hooks are pairs of a name and a function"],
    "model.likely(text, n='3')": ["n='3': allowed are 1 to 4096"],
    "ws.HookedRecurrentModel.from_pretrained(3)": ["named by a text or a path; got 3"],
    "ws.HookedRecurrentModel.from_pretrained('tiny-gnd')": ["tiny-gnd is not shipped", "did you mean 'tiny-gdn'?"],
    "ws.WriteSAE.from_pretrained('tiny-gnd/L2H1')": ["(did you mean 'tiny-gdn/L2H1'?)"],
    "ws.population_test(model, sae, text, atom=3)": ["argument 'atom'", "did you mean 'atoms'?"],
    "ws.steer": ["no attribute 'steer'", "did you mean 'Steer'?"],
    "cache['q']": ["of which layer?", "cache['q', layer]"],
    "model.run_with_cache(text, names='q')": ["of which layer?", "blocks.0.mixer.hook_q"],
    "model(text, positions='all')": ["no argument 'positions'"],
    "edited(ws.Delete(layer=2, head=0), positions='all')": ["positions='all'", "leave positions out"],
    "ws.gradient(model, text, ' no such token')": ["give one token"],
    "ws.Logit(' the')(torch.zeros(1, 1, 9))": ["model.to_single_token(' the')"],
    "ws.gradient(model, text, ws.Logit(' the', ' a'))": ["Logit(token, minus=other)"],
    "ws.WriteSAE.from_pretrained('tiny-gdn')": ["is a model, not an SAE", "tiny-gdn/L"],
    "ws.HookedRecurrentModel('tiny-gdn')": ["HookedRecurrentModel.from_pretrained('tiny-gdn')"],
    "ws.train_site(model, text, 2, 0, encoder='tied')": ["variant is one of", "TiedSAE"],
    "ws.train_site(model, text, 2, 0, target='resid_post')": ["no target 'resid_post'", "write, delta, state"],
    "ws.train_site(model, text, 2, 0, stpes=3)": ["did you mean 'steps'"],
    "ws.train_site(model, text, 2, 0, choices={'rnak': 2})": ["did you mean 'rank'"],
    "convert('/no/such/folder', 'x')": ["/no/such/folder is not there"],
}
PLAIN = {  # where the meaning is plain, it is taken
    "cache.state(1, -1)": "cache.state(1, [-1])",
    "model.run_with_hooks(text, (('k', 1), halved))": "model.run_with_hooks(text, [(('k', 1), halved)])",
    "edited(ws.Substitute(sae, atom=fire))": "edited(ws.Substitute(sae))",  # all that fire
    "edited(ws.Substitute(sae, atom=fire[:1]))": "edited(ws.Substitute(sae, atom=fire[0]))",
    "cache.state(1, -1, heads=0)": "cache.state(1, [-1], heads=[0])",
    "ws.gradient(model, text, ' the').value": "ws.gradient(model, text, ws.Logit(model.to_single_token(' the'))).value",
    "ws.gradient(model, text, ws.Logit(' the', minus=' a')).value": "ws.gradient(model, text, ws.Logit(model.to_single_token(' the'), minus=model.to_single_token(' a'))).value",  # noqa: E501
}
SCRIPT = """
import json, sys, torch
import writesae as ws
from writesae.saes.paper.convert import convert
model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
sae = ws.WriteSAE.from_pretrained("tiny-gdn/L2H1")
text = "The state of the Union is strong and the people"
_, cache = model.run_with_cache(text)
fire = model.encode(sae, text).indices.unique().tolist()
assert len(fire) > 2
halved = lambda x, hook: x / 2

def edited(*edits, **options):
    with model.intervene(*edits, **options):
        return model(text)

mistakes, plain = json.load(sys.stdin)
said = {}
for code in mistakes:
    try:
        said[code] = f"no error: {eval(code)!r}"[:200]
    except Exception as error:
        said[code] = f"{type(error).__name__}: {error}"
same = {code: bool(torch.equal(eval(code), eval(meant))) for code, meant in plain.items()}
print(json.dumps([said, same]))
"""


@pytest.fixture(scope="module")
def made():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps([list(MISTAKES), PLAIN]), capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("code", MISTAKES)
def test_a_mistake_is_answered_with_its_fix(made, code):
    said = made[0][code]
    assert not said.startswith("no error"), said
    for part in MISTAKES[code]:
        assert part in said, said


@pytest.mark.parametrize("code", PLAIN)
def test_what_is_plainly_meant_is_taken(made, code):
    assert made[1][code]
