# docker build -t aligntok .
# docker run --gpus all --ipc=host --rm -v "$PWD:/work" aligntok fit --config stage1.yaml
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE /src/
COPY aligntok /src/aligntok
COPY configs /src/configs
RUN pip install --no-cache-dir '/src[offline]' && rm -rf /src
WORKDIR /work
ENTRYPOINT ["aligntok"]
