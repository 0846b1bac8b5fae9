"""Record bodies of OpenTelemetry's Python exporter for Prometheus.

pip install opentelemetry-exporter-prometheus==0.66b2, then
python opentelemetry.py text > opentelemetry.txt
python opentelemetry.py openmetrics > opentelemetry.openmetrics
"""

import sys

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from prometheus_client import REGISTRY, exposition
from prometheus_client.openmetrics import exposition as openmetrics

resource = Resource.create({"service.name": "shop", "service.instance.id": "a-1", "host.name": "h"})
meter = MeterProvider([PrometheusMetricReader()], resource).get_meter("shop.meter", "1.0")
requests = meter.create_counter("http.server.requests", "1", "Requests.")
active = meter.create_up_down_counter("http.server.active_requests", "1", "Running requests.")
seconds = meter.create_histogram("http.server.duration", "s", "Time of a request.")
for number in range(4):
    labels = {"http.method": "GET", "http.route": f"/items/{number % 5}", "code": number % 3}
    requests.add(number, labels)
    active.add(number % 2 - 0.5, labels)
    seconds.record(number / 1e7, labels)
form = openmetrics if sys.argv[1] == "openmetrics" else exposition
sys.stdout.write(form.generate_latest(REGISTRY).decode())
