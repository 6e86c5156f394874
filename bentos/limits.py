"""Limits of the service, in one place. docs/serving.md and the manifests rely on them."""

MAX_BATCH = 16  # completions decoded at the same time
MAX_QUEUE = 64  # requests waiting for a slot in the batch; further ones get a 429
RETRY_AFTER = 1  # seconds; the Retry-After header of a 429
MAX_SHADOWS = 64  # requests queued for a canary in shadow mode; further ones are dropped
MAX_ADAPTERS = 32  # adapters loaded in addition to the run's own
ADAPTERS_POLL = 2.0  # seconds between two reads of the manifest of shared adapters

MAX_BODY = 1_000_000  # bytes of a request's body
MAX_TOTAL_BODY = 100_000_000  # bytes of all bodies that are being received at the same time
SMALL_BODY = 64_000  # bytes of a body that is received even above MAX_TOTAL_BODY
MAX_ERRORS = 1_000  # errors of a body; more are only counted: listing 100,000 would block the event loop for 0.5 s
MAX_HEADER_BYTES = 64_000  # bytes of a request without its body: request line, headers, trailers, chunk framing
HEADER_TIMEOUT = 10.0  # seconds from a connection, or a request's first byte, to the end of its headers
KEEP_ALIVE = 75  # seconds that an idle connection is kept: more than the 60 s of nginx and of load balancers
DEADLINE = 55.0  # seconds from a request's head to the end of its response, streams included

MAX_STOPS, MAX_STOP_LENGTH = 16, 400  # stop strings of one request, and the characters of each
MAX_GUIDED_CHOICES = 256  # texts of guided_choice
MAX_STRUCTURE = 16_000  # characters of a regex, a schema or all choices: with such a literal, a mask takes 0.1 s
MAX_PATTERNS = 10  # different patterns and formats of a schema: combining 13 took 4 s, combining 29 did not end
MAX_MULTIPLE = 10_000  # least common multiple of a schema's multipleOf values: 99,999 took 1.5 s, 999,983 did not end
GRAMMAR_FUEL = 20_000  # work units of llguidance for a grammar; its default, 1,000,000, allows 11 s per token
MASK_TIMEOUT = 5.0  # seconds that the engine waits for the allowed tokens of one completion
MAX_STOP_TOKENS, MAX_BIASES = 64, 1_024  # stop_token_ids and logit_bias of one request
MAX_CORRECTION, MAX_COMMENT = 20_000, 2_000  # characters of feedback
MAX_CHOICES = 8  # `n` of a request to the OpenAI routes
MAX_PROMPTS = MAX_QUEUE  # prompts of a request, and their product with `n`, which then fits into the queue

DRAIN_MIN, DRAIN_MAX = 1.0, 5.0  # seconds after SIGTERM in which the service still accepts connections
LAST_HANDSHAKES = 0.2  # seconds after that in which connections that are already being opened are accepted
LAST_REQUESTS = 1.0  # seconds after the port closed in which open connections may still send a request
