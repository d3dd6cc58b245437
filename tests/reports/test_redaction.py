"""Which addresses strangers may read."""

import pytest

from trl_bbkd.reports.redaction import public_text


@pytest.mark.parametrize("host", ["gpu", "localhost", "127.0.0.1", "[::1]", "[fd00::5]", "192.168.1.7", "a.internal"])
def test_hosts_of_a_network_of_ones_own_are_left_out(host):
    assert public_text(f"http://{host}:8000/v1 and https://{host}/v1") == "http://***/v1 and https://***/v1"


@pytest.mark.parametrize("host", ["api.openai.com", "8.8.8.8", "[2606:4700:4700::1111]"])
def test_a_providers_are_kept(host):
    assert public_text(f"https://{host}:8000/v1") == f"https://{host}:8000/v1"
