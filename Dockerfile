# medsd for NVIDIA GPUs or, with VARIANT=cpu, for machines without one. How to build and run it: README.md, "In a container".
#
# PyPI's torch brings the runtime libraries of CUDA 13.0, so the image needs no CUDA of its own, and the host its driver (580 or newer)
# and the NVIDIA Container Toolkit.
ARG VARIANT=gpu

FROM python:3.11.15-slim-bookworm AS base
# The compiler is for torch.compile (--compile). Debian keeps one version of it in a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/medsd
COPY constraints.txt pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > needed.txt

FROM base AS wheel
RUN pip install --no-cache-dir -c constraints.txt hatchling
COPY README.md LICENSE NOTICE ./
COPY recipes recipes
COPY medsd medsd
RUN python -m hatchling build --target wheel

# What medsd needs is installed before medsd itself, so that a change of its sources brings no new torch.
FROM base AS cpu
RUN pip install --no-cache-dir -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch \
    && pip install --no-cache-dir -c constraints.txt -r needed.txt

FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility NVIDIA_REQUIRE_CUDA="cuda>=13.0"
RUN pip install --no-cache-dir -c constraints.txt -r needed.txt xformers bitsandbytes

# hadolint ignore=DL3006
FROM ${VARIANT}
COPY --from=wheel /opt/medsd/dist /opt/medsd/dist
RUN pip install --no-cache-dir --no-deps /opt/medsd/dist/*.whl
# Whoever runs it (--user) may write to two folders: runs, and a home for the Hub's cache and the secret that patients are hashed with.
RUN useradd --create-home --uid 1000 medsd \
    && mkdir -p /medsd/runs \
    && chmod 1777 /medsd/runs /home/medsd
WORKDIR /medsd
RUN medsd recipes
# torch asks for the user's name, which the number behind --user need not have.
ENV HOME=/home/medsd USER=medsd HF_HOME=/home/medsd/.cache/huggingface PYTHONUNBUFFERED=1
VOLUME ["/medsd/runs", "/home/medsd"]
USER 1000
# Without a launcher, so that the SIGTERM of `docker stop` reaches the training, which saves a checkpoint.
CMD ["python", "recipes/finetune_unet.py"]
