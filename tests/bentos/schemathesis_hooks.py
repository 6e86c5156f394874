"""Read by schemathesis: its check that valid requests are accepted, except for what a schema cannot express."""

import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

INEXPRESSIBLE = (
    "context_length_exceeded",  # a schema can limit the characters of a text, but not its tokens
    "the last message must be",  # nor say anything about the last item of a list
    "either prompt or messages is required",  # rules for several fields
    "not together with",
    "min_tokens is",
    "best_of is",
    "one request may have at most",  # the product of two fields
    "contains the token id",  # keys are limited by their pattern only
    "guided_json: ",  # the field is text or a schema that must be valid itself
    "guided_regex: ",
    "response_format: ",
    "structured_outputs: ",
)


@schemathesis.check
def accepted_unless_inexpressible(ctx, response, case):
    if response.status_code == 400 and any(text in response.text for text in INEXPRESSIBLE):
        return None
    return positive_data_acceptance(ctx, response, case)
