# syntax=docker/dockerfile:1
# docker build -t gptoss_jax .                          CPU; add --build-arg EXTRA=cuda or EXTRA=tpu for an accelerator
# docker run --rm -v "$PWD:/data" gptoss_jax train quickstart
# docker run --rm -v "$PWD:/data" -p 8000:8000 gptoss_jax serve runs/quickstart --host 0.0.0.0
FROM python:3.13-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
ARG EXTRA=""
# The CPU kernels are compiled on first use.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
COPY constraints/latest.txt /constraints.txt
RUN pip install --no-cache-dir -c /constraints.txt "$(ls /wheels/*.whl)[serve,hf${EXTRA:+,$EXTRA}]" && rm -r /wheels

# Runs, exports and the caches are in /data: mount a folder that user 1000 can write to.
RUN useradd --uid 1000 --create-home gptoss && mkdir /data && chown gptoss /data
USER 1000
WORKDIR /data
ENV XDG_CACHE_HOME=/data/.cache HF_HOME=/data/.cache/huggingface
EXPOSE 8000
ENTRYPOINT ["gptoss"]
CMD ["--help"]
