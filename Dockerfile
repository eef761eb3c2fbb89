# docker build -t aligntok . ; docker run --gpus all --rm -v "$PWD:/work" aligntok fit --config stage1.yaml ...
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir '/src[offline]' && rm -rf /src
WORKDIR /work
ENTRYPOINT ["aligntok"]
