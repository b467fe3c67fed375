# The server as an image: `docker build --tag setpoint:0.1.0 .`, then
# `docker run --gpus all --env SETPOINT_API_KEY --env SETPOINT_MODEL=… --publish 8000:8000 --read-only --tmpfs /tmp
#  --volume store:/data --volume cache:/cache setpoint:0.1.0`.
# Any Debian or Ubuntu with Python 3.11 or newer is a base. PyPI's torch brings CUDA's libraries, the driver comes from
# the NVIDIA container toolkit. For a CPU: --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG BASE_IMAGE=debian:12.12-slim

FROM ${BASE_IMAGE} AS base
# Triton compiles a launcher for every kernel at run time: a C compiler and Python's headers. `--compile` needs g++.
# Versions are those of the base image's release, whichever that is.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM base AS dependencies
ARG PIP_INDEX_URL=https://pypi.org/simple
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT
# Extras of pyproject.toml, as `quantized` or `ray,s3`; `vllm` for --engine vllm.
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/setpoint
WORKDIR /src
# What it depends on is a layer of its own (gigabytes), which a change of the code leaves as it is.
COPY pyproject.toml ./
RUN python3 -c "import tomllib; t = tomllib.load(open('pyproject.toml', 'rb')); p = t['project']; \
print(*t['build-system']['requires'], *p['dependencies'], \
*(d for e in '${EXTRAS}'.split(',') if e for d in p['optional-dependencies'][e]), sep='\n')" \
    > requirements.txt \
    && /opt/setpoint/bin/pip install --requirement requirements.txt

FROM dependencies AS project
COPY README.md LICENSE ./
COPY kernels kernels
COPY steering steering
COPY server server
# With a prefix of its own, to be copied alone; pip writes the byte code, which a read-only file system could not take.
# An isolated build would fetch setuptools again, and knows no PIP_CERT.
RUN /opt/setpoint/bin/pip install --no-deps --no-build-isolation --prefix /project .

FROM base AS image
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="setpoint" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number that Kubernetes can tell from root; a volume that is new takes the folders' owner.
RUN groupadd --gid 10001 setpoint \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin setpoint \
    && mkdir /data /cache \
    && chown 10001:10001 /data /cache
COPY --from=dependencies /opt/setpoint /opt/setpoint
COPY --from=project /project /opt/setpoint
# All that is written goes to /data (the store), /cache (compiled kernels and models; not a noexec mount, for they are
# loaded from there) and /tmp, so that the root file system may be read-only.
# hadolint takes TOKENIZERS_PARALLELISM for a secret.
# hadolint ignore=DL3064
ENV PATH=/opt/setpoint/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    NUMBA_CACHE_DIR=/cache/numba \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    SETPOINT_STORE=/data \
    SETPOINT_PORT=8000
VOLUME ["/data", "/cache"]
WORKDIR /data
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# 503 while the model loads: an orchestrator waits through the start period, and counts no failure in it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['SETPOINT_PORT'] + '/health/ready', timeout=4)"]
ENTRYPOINT ["setpoint"]
# Others can reach this host, so it starts with an API key alone: SETPOINT_API_KEY, and SETPOINT_ADMIN_KEY to guard writing.
CMD ["serve", "--host", "0.0.0.0"]
