# Everything that trains, searches and tracks. To be built at the top of the repository:
#   docker build --file deploy/training.Dockerfile --tag wafer-training .

# Another place that has the same image can be named: --build-arg PYTHON_IMAGE=...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE}
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# What opencv, which ultralytics needs, wants of the system; the versions are those of the image's Debian.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY requirements.txt ./
# psycopg is what the extra `postgresql` asks for. PIP_INDEX_URL and the like can be given as --build-arg, as for a
# PyTorch without CUDA, which is several gigabytes smaller.
RUN pip install --no-cache-dir --only-binary :all: --requirement requirements.txt "psycopg[binary]>=3.2"
# Readable for the user below, whatever the umask of the clone was.
COPY --chmod=755 integrated_pipeline.py simple_model.py run_experiment.py predict.py ./
COPY --chmod=755 waferlab ./waferlab
# No write outside of /tmp and what is mounted, so that the root file system can be read-only.
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONPATH=/app \
    MPLCONFIGDIR=/tmp/matplotlib \
    YOLO_CONFIG_DIR=/tmp/ultralytics \
    ORT_DISABLE_TELEMETRY=1 \
    MLFLOW_DISABLE_TELEMETRY=true
# A number, since Kubernetes' runAsNonRoot does not accept a name.
USER 10001:10001
CMD ["python", "run_experiment.py", "--help"]
