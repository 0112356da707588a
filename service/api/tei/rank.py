"""TEI's `/rerank` and `/similarity`: how close texts are, by their vectors. Translation only."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from service.api.tei.bodies import RerankBody, SimilarityBody, SimilarityParameters, TEIRank
from service.api.tei.dialect import ERRORS, UNSUPPORTED, tei_documented
from service.api.tei.embed import to_embed_request
from service.embedding.instructions import NONE, Chosen
from service.embedding.requests import EmbedResult
from service.embedding.rows import Vector
from service.errors import InvalidRequest
from service.http.call import Call

router = APIRouter(tags=["text-embeddings-inference"], responses={401: ERRORS[401]})


@router.post(
    "/similarity",
    **tei_documented(
        SimilarityBody,
        list[float],
        {
            "inputs": {
                "source_sentence": "A plane is taking off.",
                "sentences": ["An air plane is taking off.", "A man is playing a flute."],
            }
        },
    ),
)
async def similarity(request: Request) -> Response:
    """The cosine of each sentence and the source sentence, which messages call the input after the last sentence."""
    return await compare(await Call.read(request, SimilarityBody))


@router.post(
    "/rerank",
    **tei_documented(
        RerankBody,
        list[TEIRank],
        {
            "query": "how much protein a day",
            "texts": ["Women need 46 grams of protein a day.", "A man is playing a flute."],
            "return_text": True,
        },
    ),
)
async def rerank(request: Request) -> Response:
    """The texts by how close they are to the query, the closest first.

    The query is embedded with the server's query instruction, or with the headers' one, and the texts with none. A
    score is (1 + cosine) / 2, from 0 to 1 like a classifier's. With raw_scores it is the cosine itself, in the same
    order. Messages call the query the input after the last text.
    """
    call = await Call.read(request, RerankBody)
    body = call.body
    call.ignore(body.model_extra)
    if not body.texts:
        raise InvalidRequest("texts is empty: send at least one", "empty_input", "texts")
    chosen = call.choose()
    if chosen.source != "header":
        chosen = Chosen(call.parts.instructions.query, "default")
    inputs = call.inputs(body.texts, NONE) + call.inputs([body.query], chosen)
    asked = to_embed_request(call, inputs, body, param="texts", beside=1)
    result = await call.embed(asked)
    cosines = _cosines(result)
    scores = cosines if body.raw_scores else (1 + cosines) / 2
    ranks: list[dict[str, Any]] = []
    for index in np.argsort(-scores, kind="stable").tolist():
        text = {"text": body.texts[index]} if body.return_text else {}
        ranks.append({"index": index, **text, "score": scores[index]})
    return call.json(ranks, inputs, result)


@router.post("/predict", responses={424: ERRORS[424]})
async def predict(request: Request) -> Response:
    """Not for this model."""
    raise InvalidRequest("this model gives vectors, it is no classifier: use /embed, or /rerank", UNSUPPORTED)


async def compare(call: Call[SimilarityBody]) -> Response:
    """The answer to `/similarity`."""
    body = call.body
    parameters = body.parameters or SimilarityParameters()
    call.ignore([*(body.model_extra or {}), *(parameters.model_extra or {})])
    sentences = body.inputs.sentences
    if not sentences:
        raise InvalidRequest("inputs.sentences is empty: send at least one", "empty_input", "inputs")
    chosen = call.choose(names={"prompt_name": parameters.prompt_name})
    # The source comes last, so that messages call each sentence by its own index.
    inputs = call.inputs([*sentences, body.inputs.source_sentence], chosen)
    result = await call.embed(to_embed_request(call, inputs, parameters, beside=1))
    return call.json(_cosines(result), inputs, result)


def _cosines(result: EmbedResult) -> Vector:
    """The cosine of the last input's vector and that of each one before; all have length 1."""
    *vectors, last = result.vectors
    cosines: Vector = np.array([vector @ last for vector in vectors], dtype=np.float32).clip(-1, 1)
    return cosines
