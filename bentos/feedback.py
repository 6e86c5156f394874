"""POST /feedback: writes a user's rating or correction of a completion to the request log."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from bentos.body import read_body
from bentos.dependencies import served
from bentos.errors import ServiceError
from bentos.openapi import ERRORS, operation
from bentos.schemas import FeedbackRequest, FeedbackResponse

router = APIRouter()


@router.post("/feedback", response_model=FeedbackResponse, responses=ERRORS, openapi_extra=operation(FeedbackRequest))
async def feedback(request: Request) -> JSONResponse:
    """Log a rating of an answer, with an optional correction and comment.

    Every well-formed request id is accepted, because another replica or an earlier process may have sent the answer.
    """
    body = await read_body(request, FeedbackRequest)
    log = served(request).request_log
    if log is None:
        raise ServiceError("forbidden", "feedback is disabled: the server has no request log (GPT2_REQUEST_LOG)")
    given = next((name for name in ("correction", "comment") if getattr(body, name) is not None), None)
    if given is not None and not log.keeps_text:
        message = f"{given}: the server keeps no texts (GPT2_REQUEST_LOG_TEXT is not keep); send the rating alone"
        raise ServiceError("forbidden", message, given)
    if not log.write_feedback(body.request_id, body.rating, body.correction, body.comment):
        raise ServiceError("overloaded", "the disk is full, or too slow, for the request log; retry")
    return JSONResponse(FeedbackResponse(request_id=body.request_id, rating=body.rating).model_dump())
