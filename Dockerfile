# The step image: all dependencies of the pipeline as tested. ZenML downloads the code at the start of a step.
#   make image-train                                                      CPU
#   make image-train TORCH_INDEX=https://download.pytorch.org/whl/cu130   CUDA
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG BUILD_IMAGE=${BASE_IMAGE}

# a separate stage, so that other changes of pyproject.toml do not reinstall the dependencies
FROM ${BUILD_IMAGE} AS requirements
COPY pyproject.toml /
RUN python3 -c "import tomllib; project = tomllib.load(open('/pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; names = ('pipeline', 'serve', 'deploy'); \
print(*project['dependencies'], *sorted({line for name in names for line in extras[name]}), sep='\n')" > /requirements.txt \
 && python3 -c "import tomllib; print(*tomllib.load(open('/pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" > /compiler.txt

FROM ${BUILD_IMAGE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY --from=requirements /requirements.txt /build/
COPY constraints.txt requirements-hashed.txt /build/
# torch's "+cpu" (or "+cu130") counts as newer than the same version of the package index.
# All packages except torch and its CUDA libraries are installed by hash.
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --quiet --no-deps --require-hashes -r /build/requirements-hashed.txt \
 && /opt/venv/bin/pip install --quiet ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} -c /build/constraints.txt -r /build/requirements.txt
# the int8 kernels, which `package` copies into the Bento
COPY --from=requirements /compiler.txt /build/
COPY setup.py /build/kernels/
COPY gpt2core/inference/native.c gpt2core/inference/*.h /build/kernels/gpt2core/inference/
RUN python3 -m venv /build/compiler \
 && /build/compiler/bin/pip install --quiet -r /build/compiler.txt \
 && cd /build/kernels && /build/compiler/bin/python setup.py --quiet build_ext --build-lib /opt/venv/lib
RUN python3 -m venv /build/sbom \
 && /build/sbom/bin/pip install --quiet cyclonedx-bom==7.5.0 \
 && /build/sbom/bin/cyclonedx-py environment --output-reproducible --output-file /opt/venv/sbom.cdx.json /opt/venv

FROM ${BASE_IMAGE}
COPY --from=build /opt/venv /opt/venv
# ZenML unpacks the code here, as the user that runs the step
RUN mkdir -m 1777 /app
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
# no health check: a step is a job, not a server
HEALTHCHECK NONE
