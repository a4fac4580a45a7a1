#!/usr/bin/env python3
"""ESP and AH made by scapy, for comparison with Postern: one JSON request a line in, one JSON answer a line out.

Requests (bytes are hexadecimal, packets begin with their IP header):

  {"op": "seal", "sa": SA, "sequence": N, "inner": P, "outer": H, "ports": [S, D], "iv": IV}   -> {"packet": P}
      Protects the packet `inner`. `outer` is the outer IP header (tunnel mode), `ports` those of UDP encapsulation.
  {"op": "rebuild", "sa": SA, "sequence": N, "inner": P, "packet": P}                           -> {"packet": P}
      Protects `inner` with the outer header, UDP ports and IV that `packet` shows: must equal `packet`.
  {"op": "open", "sa": SA, "sequence": N, "packet": P}                                          -> {"inner": P}
      Verifies and opens `packet`; `sequence` gives the high half of extended sequence numbers.
  {"op": "send", "interface": NAME, "frame": F}                                                 -> {}
      Puts an Ethernet frame on an interface.

SA: {"protocol": "esp" | "ah", "mode": "tunnel" | "transport", "spi": N, "esn": bool, "natt": bool,
     "encryption": NAME, "key": K, "integrity": NAME, "integrity_key": K, "ah": null | SA of the bundle's AH}
Keys carry their salt as in the configuration. An answer {"error": TEXT} says what went wrong.

scapy does ESP and AH. What it lacks is built here from the RFC with
the `cryptography` package: AES-GMAC in AH (RFC 4543 section 4), and AH over ESP, which scapy signs in the wrong place.
"""
import hashlib
import hmac
import json
import logging
import socket
import struct
import sys

logging.getLogger("scapy").setLevel(logging.ERROR)

from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: E402
from scapy.layers.inet import IP, UDP  # noqa: E402
from scapy.layers.inet6 import IPv6, in6_chksum  # noqa: E402
from scapy.layers.ipsec import AH, ESP, SecurityAssociation, zero_mutable_fields  # noqa: E402
from scapy.packet import Raw  # noqa: E402

ENCRYPTION = {
    "null": "NULL",
    "aes-cbc": "AES-CBC",
    "aes-gcm": "AES-GCM",
    "chacha20-poly1305": "CHACHA20-POLY1305",
    "aes-gmac": "AES-NULL-GMAC",
}
INTEGRITY = {
    "none": None,
    "hmac-sha1-96": "HMAC-SHA1-96",
    "hmac-sha2-256-128": "SHA2-256-128",
    "hmac-sha2-384-192": "SHA2-384-192",
    "hmac-sha2-512-256": "SHA2-512-256",
}
# For AH: hash, and bytes of it that are sent (RFC 2404, RFC 4868).
HMAC = {
    "hmac-sha1-96": (hashlib.sha1, 12),
    "hmac-sha2-256-128": (hashlib.sha256, 16),
    "hmac-sha2-384-192": (hashlib.sha384, 24),
    "hmac-sha2-512-256": (hashlib.sha512, 32),
}
IV_SIZE = {"null": 0, "aes-cbc": 16, "aes-gcm": 8, "chacha20-poly1305": 8, "aes-gmac": 8}
PROTO_UDP, PROTO_ESP, PROTO_AH = 17, 50, 51


def parse(packet):
    """The packet as scapy sees it."""
    return IP(packet) if packet[0] >> 4 == 4 else IPv6(packet)


def header_size(packet):
    """Bytes of the IP header; what the tests send has no IPv6 extension headers."""
    return (packet[0] & 15) * 4 if packet[0] >> 4 == 4 else 40


def protocol_of(packet):
    return packet[9] if packet[0] >> 4 == 4 else packet[6]


def with_protocol(packet, number):
    """The same packet with another protocol number, length and checksum right."""
    size = header_size(packet)
    head, body = bytearray(packet[:size]), packet[size:]
    if head[0] >> 4 == 4:
        head[9] = number
        head[2:4] = struct.pack("!H", size + len(body))
        head[10:12] = b"\0\0"
        total = sum(struct.unpack(f"!{size // 2}H", head))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        head[10:12] = struct.pack("!H", ~total & 0xFFFF)
    else:
        head[6] = number
        head[4:6] = struct.pack("!H", len(body))
    return bytes(head) + body


def association(sa, sequence, outer=None, ports=None):
    """scapy's object for an ESP SA. It takes a number 0 (the low half, with ESN) only as the association's own."""
    natt = None
    if sa.get("natt"):
        sport, dport = ports or (4500, 4500)
        natt = UDP(sport=sport, dport=dport)
    return SecurityAssociation(
        ESP,
        spi=sa["spi"],
        seq_num=sequence & 0xFFFFFFFF,
        crypt_algo=ENCRYPTION[sa["encryption"]],
        crypt_key=bytes.fromhex(sa["key"]) or None,
        auth_algo=INTEGRITY[sa["integrity"]],
        auth_key=bytes.fromhex(sa["integrity_key"]) or None,
        tunnel_header=outer,
        nat_t_header=natt,
        esn_en=sa["esn"],
    )


def ah_icv_size(sa):
    """Bytes of the ICV field without padding: RFC 4543 section 4 puts the 8-byte IV into the field, before the ICV."""
    return 8 + 16 if sa["integrity"] == "aes-gmac" else HMAC[sa["integrity"]][1]


def ah_icv(sa, packet, sequence, iv):
    """ICV field (no padding) of `packet`, whose AH header has zeros there (the IV, where there is one, is filled in)."""
    covered = parse(packet)
    # What follows AH is opaque here: scapy must not go looking for an ESP layer.
    covered[AH].payload = Raw(bytes(covered[AH].payload))
    size = len(covered[AH].icv) + len(covered[AH].padding)
    field = bytes(covered[AH].icv) + bytes(covered[AH].padding)
    covered = bytes(zero_mutable_fields(covered, sending=False))
    at = covered.index(struct.pack("!II", sa["spi"], sequence & 0xFFFFFFFF)) + 8
    covered = covered[:at] + field + covered[at + size :]
    if sa["esn"]:
        covered += struct.pack("!I", sequence >> 32)
    key = bytes.fromhex(sa["integrity_key"])
    if sa["integrity"] == "aes-gmac":
        return iv + AESGCM(key[:-4]).encrypt(key[-4:] + iv, b"", covered)
    digest, size = HMAC[sa["integrity"]]
    return hmac.new(key, covered, digest).digest()[:size]


def seal_ah(sa, sequence, packet, outer, iv):
    """AH over `packet`: in transport mode behind its IP header, in tunnel mode over all of it."""
    if sa["mode"] == "tunnel":
        next_header = 4 if packet[0] >> 4 == 4 else 41
        head, body = outer, packet
    else:
        next_header = protocol_of(packet)
        head, body = packet[: header_size(packet)], packet[header_size(packet) :]
    field = ah_icv_size(sa)
    # RFC 4302 section 3.3.3.2.1: padding makes the header a multiple of 4 bytes, for IPv6 of 8.
    padding = -(12 + field) % (4 if head[0] >> 4 == 4 else 8)
    fixed = struct.pack("!BBHII", next_header, (12 + field + padding) // 4 - 2, 0, sa["spi"], sequence & 0xFFFFFFFF)
    start = iv if sa["integrity"] == "aes-gmac" else b""
    empty = start + bytes(field - len(start)) + bytes(padding)
    whole = with_protocol(head + fixed + empty + body, PROTO_AH)
    icv = ah_icv(sa, whole, sequence, iv)
    at = header_size(whole) + 12
    return whole[:at] + icv + whole[at + field :]


def open_ah(sa, sequence, packet):
    """Verifies AH and takes it off."""
    size = header_size(packet)
    if protocol_of(packet) != PROTO_AH:
        raise ValueError("no AH header")
    next_header, length, _, spi, low = struct.unpack("!BBHII", packet[size : size + 12])
    if spi != sa["spi"]:
        raise ValueError(f"SPI {spi:#x}")
    length = (length + 2) * 4
    field = packet[size + 12 : size + length]
    iv = field[:8] if sa["integrity"] == "aes-gmac" else b""
    sequence = (sequence >> 32) << 32 | low
    blank = iv + bytes(len(field) - len(iv))
    expected = ah_icv(sa, packet[: size + 12] + blank + packet[size + length :], sequence, iv)
    if not hmac.compare_digest(expected, field[: len(expected)]):
        raise ValueError("AH ICV does not fit")
    if sa["mode"] == "tunnel":
        return packet[size + length :]
    return with_protocol(packet[:size] + packet[size + length :], next_header)


def seal_esp(sa, sequence, inner, outer, ports, iv):
    tunnel = parse(outer) if sa["mode"] == "tunnel" else None
    sealing = association(sa, sequence, tunnel, ports)
    packet = bytes(sealing.encrypt(parse(inner), iv=iv, esn_en=sa["esn"], esn=sequence >> 32))
    if sa.get("natt") and packet[0] >> 4 == 6:
        # RFC 3948 section 2.1 wants a zero checksum in IPv4; over IPv6 it may not be zero (RFC 8200 section 8.1).
        # scapy writes zero in both.
        checksum = in6_chksum(PROTO_UDP, parse(packet), packet[40:]) or 0xFFFF
        packet = packet[:46] + struct.pack("!H", checksum) + packet[48:]
    return packet


def open_esp(sa, sequence, packet):
    seen = parse(packet)
    ports = None
    if sa.get("natt"):
        if not seen.haslayer(UDP):
            raise ValueError("no UDP header")
        ports = (seen[UDP].sport, seen[UDP].dport)
        size = header_size(packet)
        seen[UDP].remove_payload()
        seen[UDP].add_payload(ESP(packet[size + 8 :]))
    elif not seen.haslayer(ESP):
        raise ValueError("no ESP header")
    outer = parse(packet[: header_size(packet)]) if sa["mode"] == "tunnel" else None
    opened = bytes(association(sa, sequence, outer, ports).decrypt(seen, esn_en=sa["esn"], esn=sequence >> 32))
    return opened


def scapy_ah(sa, sequence, inner, outer):
    """AH as scapy makes it; opening goes through this file's own code, so the two check each other."""
    association = SecurityAssociation(
        AH,
        spi=sa["spi"],
        seq_num=sequence & 0xFFFFFFFF,
        auth_algo=INTEGRITY[sa["integrity"]],
        auth_key=bytes.fromhex(sa["integrity_key"]),
        tunnel_header=parse(outer) if sa["mode"] == "tunnel" else None,
        esn_en=sa["esn"],
    )
    packet = parse(inner)
    return bytes(association.encrypt(packet, esn_en=sa["esn"], esn=sequence >> 32))


def seal(sa, sequence, inner, outer, ports, iv, ah_iv):
    if sa["protocol"] == "ah":
        if sa["integrity"] in INTEGRITY:
            return scapy_ah(sa, sequence, inner, outer)
        return seal_ah(sa, sequence, inner, outer, ah_iv)
    packet = seal_esp(sa, sequence, inner, outer, ports, iv)
    if sa.get("ah"):
        packet = seal_ah(sa["ah"], sequence, packet, None, ah_iv)
    return packet


def unhex(request, name):
    return bytes.fromhex(request.get(name) or "")


def op_seal(request):
    sa = request["sa"]
    iv = unhex(request, "iv") or None
    ah_iv = unhex(request, "ah_iv") or bytes(8)
    outer = unhex(request, "outer")
    packet = seal(sa, request["sequence"], unhex(request, "inner"), outer, request.get("ports"), iv, ah_iv)
    return {"packet": packet.hex()}


def op_rebuild(request):
    sa, packet, inner = request["sa"], unhex(request, "packet"), unhex(request, "inner")
    size = header_size(packet)
    outer, rest, ports, iv, ah_iv = packet[:size], packet[size:], None, None, b""
    ah = sa if sa["protocol"] == "ah" else sa.get("ah")
    if ah:
        ah_iv = rest[12:20] if ah["integrity"] == "aes-gmac" else b""
        rest = rest[(rest[1] + 2) * 4 :]
    if sa["protocol"] == "esp":
        if sa.get("natt"):
            ports = struct.unpack("!HH", rest[:4])
            rest = rest[8:]
        iv = rest[8 : 8 + IV_SIZE[sa["encryption"]]] or None
    if sa["mode"] == "transport":
        # The header is the packet's own; whether it kept the inner one's fields is the caller's to compare.
        inner = with_protocol(outer + inner[header_size(inner) :], protocol_of(inner))
    else:
        outer = with_protocol(outer, PROTO_UDP)
    return {"packet": seal(sa, request["sequence"], inner, outer, ports, iv, ah_iv).hex()}


def op_open(request):
    sa, packet, sequence = request["sa"], unhex(request, "packet"), request.get("sequence", 0)
    if sa["protocol"] == "ah":
        return {"inner": open_ah(sa, sequence, packet).hex()}
    if sa.get("ah"):
        packet = open_ah(sa["ah"], sequence, packet)
    return {"inner": open_esp(sa, sequence, packet).hex()}


def op_send(request):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
        out.bind((request["interface"], 0))
        out.send(unhex(request, "frame"))
    return {}


def main():
    operations = {"seal": op_seal, "rebuild": op_rebuild, "open": op_open, "send": op_send}
    for line in sys.stdin:
        try:
            request = json.loads(line)
            answer = operations[request["op"]](request)
        except Exception as error:  # every failure is an answer: the caller decides what it means
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
