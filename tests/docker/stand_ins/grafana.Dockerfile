# What grafana/grafana would find: its user, its directories, nothing of Grafana itself.
FROM debian:13-slim
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-yaml && rm -rf /var/lib/apt/lists/* \
    && install -d -o 472 -g 0 /var/lib/grafana && install -d /etc/grafana/provisioning
COPY grafana.py /run.py
USER 472
EXPOSE 3000
ENTRYPOINT ["python3", "/run.py"]
