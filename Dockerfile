# medsd on an NVIDIA GPU. Build: docker build -t medsd .   Run: docker run --gpus all -v "$PWD/runs:/home/medsd/runs" medsd
FROM python:3.11-slim

RUN useradd --create-home medsd
WORKDIR /home/medsd
COPY --chown=medsd constraints.txt pyproject.toml README.md LICENSE ./
COPY --chown=medsd medsd medsd
COPY --chown=medsd recipes recipes
RUN pip install --no-cache-dir -c constraints.txt -e ".[gpu]"
USER medsd
CMD ["accelerate", "launch", "recipes/finetune_unet.py"]
