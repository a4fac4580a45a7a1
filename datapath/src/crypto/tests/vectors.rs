//! Test vectors as published.

use super::*;

/// One published packet.
struct Packet {
    /// Key and salt.
    key: &'static str,
    /// SPI and sequence number, the latter with 64 bits when it is extended.
    header: &'static str,
    iv: &'static str,
    plaintext: &'static str,
    sealed: &'static str,
    icv: &'static str,
}

fn hex(digits: &str) -> Vec<u8> {
    assert!(digits.len().is_multiple_of(2), "{digits}");
    let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal");
    (0..digits.len()).step_by(2).map(byte).collect()
}

/// Opens the packet through the backend, and seals it with the published IV to the same bytes.
fn check(encryption: Encryption, packet: &Packet) {
    let suite = Suite {
        encryption,
        encryption_key: Secret::new(hex(packet.key)),
        integrity: Integrity::None,
        integrity_key: Secret::empty(),
    };
    let key = EspKey::new(&suite).unwrap();
    let (spi, number) = (hex(packet.header)[..4].to_vec(), hex(packet.header)[4..].to_vec());
    let esn = number.len() == 8;
    let low = number[number.len() - 4..].to_vec();
    let sequence = number.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let (plain, sealed) = (hex(packet.plaintext), hex(packet.sealed));
    let whole = [spi.clone(), low.clone(), hex(packet.iv), sealed, hex(packet.icv)].concat();

    let (outcome, opened) = open(&key, sequence, esn, &whole);
    assert_eq!(outcome, Outcome::Opened, "{}", packet.icv);
    assert_eq!(text(&key, &opened), plain, "{}", packet.icv);

    let iv = hex(packet.iv).try_into().unwrap();
    let high = esn.then(|| sequence::high(sequence));
    let mut made = [spi, low, vec![0xa5; 8], plain, vec![0xa5; TAG]].concat();
    match &key.0 {
        Kind::Aead(aead) if !aead.is_gmac() => {
            seal_aead(&aead.expand(&mut engine().keys).unwrap(), iv, high, &mut made).unwrap();
        }
        Kind::Aead(aead) => {
            seal_gmac(&aead.expand(&mut engine().keys).unwrap(), iv, high, &mut made).unwrap();
        }
        Kind::Cbc(..) | Kind::Null(_) => panic!("no AEAD"),
    }
    assert_eq!(made, whole, "{}", packet.icv);
}

/// DP-3: draft-mcgrew-gcm-test-01 section 4, AES-GCM in ESP: keys of 128, 192 and 256 bits, with and without ESN.
#[test]
fn dp_3_mcgrew_gcm_esp() {
    for packet in &MCGREW_GCM {
        check(Encryption::AesGcm16, packet);
    }
}

/// DP-3: draft-mcgrew-gcm-test-01 section 4, AES-GMAC in ESP: the IV is in the AAD.
#[test]
fn dp_3_mcgrew_gmac_esp() {
    let text = "45000030da3a00008001df3bc0a80005c0a800010800c6cd0200070061626364\
                65666768696a6b6c6d6e6f707172737401020201";
    check(
        Encryption::NullAuthAesGmac,
        &Packet {
            key: "4c80cdefbb5d10da906ac73c3613a63422433c64",
            header: "0000432100000007",
            iv: "0000000000000000",
            plaintext: text,
            sealed: text,
            icv: "f2a9a836e155106aa8dcd618e4099aaa",
        },
    );
}

/// DP-3: RFC 7634 appendix A, the whole ESP packet.
#[test]
fn dp_3_rfc_7634_appendix_a() {
    check(
        Encryption::ChaCha20Poly1305,
        &Packet {
            key: "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3",
            header: "0102030400000005",
            iv: "1011121314151617",
            plaintext: "45000054a6f200004001e778c6336405c000020508005b7a3a080000553bec100007362708090a0b\
                        0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f30313233\
                        3435363701020204",
            sealed: "24039428b97f417e3c13753a4f05087b67c352e6a7fab1b982d466ef407ae5c614ee8099d52844eb\
                     61aa95dfab4c02f72aa71e7c4c4f64c9befe2facc638e8f3cbec163fac469b502773f6fb94e664da\
                     9165b82829f641e0",
            icv: "76aaa8266b7fb0f7b11b369907e1ad43",
        },
    );
}

/// DP-3: The GCM specification's test cases 1, 7 and 13: GMAC of nothing.
#[test]
fn dp_3_gcm_specification_empty() {
    for (len, tag) in [
        (20, "58e2fccefa7e3061367f1d57a4e7455a"),
        (28, "cd33b28ac773f74ba00ed1f312572435"),
        (36, "530f8afbc74536b9a963b4f1c4cb738b"),
    ] {
        let key = AeadKey::new(Encryption::AesGcm16, &vec![0; len]).unwrap();
        assert_eq!(
            key.expand(&mut engine().keys).unwrap().seal([0; 8], &[], &mut []).unwrap()[..],
            hex(tag),
            "{len}"
        );
    }
}

/// DP-3: RFC 3602 section 4, cases 1 to 8, and NIST SP 800-38A F.2.3 and F.2.5 for the longer keys.
#[test]
fn dp_3_cbc() {
    let nist = "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51\
                30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710";
    let cases: [[&str; 4]; 10] = [
        [
            "06a9214036b8a15b512e03d534120006",
            "3dafba429d9eb430b422da802c9fac41",
            "53696e676c6520626c6f636b206d7367",
            "e353779c1079aeb82708942dbe77181a",
        ],
        [
            "c286696d887c9aa0611bbb3e2025a45a",
            "562e17996d093d28ddb3ba695a2e6f58",
            "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
            "d296cd94c2cccf8a3a863028b5e1dc0a7586602d253cfff91b8266bea6d61ab1",
        ],
        [
            "6c3ea0477630ce21a2ce334aa746c2cd",
            "c782dc4c098c66cbd9cd27d825682c81",
            "5468697320697320612034382d62797465206d657373616765202865786163746c7920332041455320626c6f636b7329",
            "d0a02b3836451753d493665d33f0e8862dea54cdb293abc7506939276772f8d5021c19216bad525c8579695d83ba2684",
        ],
        [
            "56e47a38c5598974bc46903dba290349",
            "8ce82eefbea0da3c44699ed7db51b7d9",
            "a0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7b8b9babbbcbdbebf\
             c0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedf",
            "c30e32ffedc0774e6aff6af0869f71aa0f3af07a9a31a9c684db207eb0ef8e4e\
             35907aa632c3ffdf868bb7b29d3d46ad83ce9f9a102ee99d49a53e87f4c3da55",
        ],
        [
            "90d382b410eeba7ad938c46cec1a82bf",
            "e96e8c08ab465763fd098d45dd3ff893",
            "08000ebda70a00008e9c083db95b070008090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\
             202122232425262728292a2b2c2d2e2f30313233343536370102030405060708090a0b0c0d0e0e01",
            "f663c25d325c18c6a9453e194e120849a4870b66cc6b9965330013b4898dc856a4699e523a55db08\
             0b59ec3a8e4b7e52775b07d1db34ed9c538ab50c551b874aa269add047ad2d5913ac19b7cfbad4a6",
        ],
        [
            "90d382b410eeba7ad938c46cec1a82bf",
            "69d08df7d203329db093fc4924e5bd80",
            "0800b5e8a80a0500a69c083d0b660e0077777777777777777777777701020201",
            "f51995881ec4e0c4488987ce742e8109689bb379d2d750c0d915dca346a89f75",
        ],
        [
            "0123456789abcdef0123456789abcdef",
            "f4e765244f6407adf13dc1380f673f37",
            "45000054090400004001f988c0a87b03c0a87bc808009f76a90a0100b49c083d02a2040008090a0b\
             0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f30313233\
             343536370102030405060708090a0a04",
            "773b5241a4c449225e4f3ce5ed611b0c237ca96cf74a93013c1b0ea1a0cf70f8e4ecaec78ac53aad\
             7a0f022b859243c647752e94a859352b8a4d4d2decd136e5c177f132ad3fbfb2201ac9904c74ee0a\
             109e0ca1e4dfe9d5a100b842f1c22f0d",
        ],
        [
            "0123456789abcdef0123456789abcdef",
            "85d47224b5f3dd5d2101d4ea8dffab22",
            "45000044090c00004001f990c0a87b03c0a87bc80800d63caa0a0200c69c083da3de0300ffffffff\
             ffffffffffffffffffffffffffffffffffffffffffffffffffffffff0102030405060708090a0a04",
            "15b92683819596a8047232cc00f7048fe45318e11f8a0f62ede3c3fc61203bb50f980a08c9843fd3\
             a1b06d5c07ff9639b7eb7dfb3512e5de435e7207ed971ef3d2726d9b5ef6affc6d17a0decbb13892",
        ],
        [
            "8e73b0f7da0e6452c810f32b809079e562f8ead2522c6b7b",
            "000102030405060708090a0b0c0d0e0f",
            nist,
            "4f021db243bc633d7178183a9fa071e8b4d9ada9ad7dedf4e5e738763f69145a\
             571b242012fb7ae07fa9baac3df102e008b0e27988598881d920a9e64f5615cd",
        ],
        [
            "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
            "000102030405060708090a0b0c0d0e0f",
            nist,
            "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d\
             39f23369a9d9bacfa530e26304231461b2eb05e2c39be9fcda6c19078c6a9d1b",
        ],
    ];
    for [key, iv, plaintext, ciphertext] in cases {
        let (key, iv) = (CbcKey::new(&hex(key)).unwrap(), hex(iv).try_into().unwrap());
        let mut text = hex(plaintext);
        key.encryptor().encrypt(iv, &mut text);
        assert_eq!(text, hex(ciphertext));
        key.decryptor().decrypt(iv, &mut text);
        assert_eq!(text, hex(plaintext));
    }
}

/// DP-3: RFC 2202 section 3 (the cases with keys of 20 bytes, cut to the 96 bits of RFC 2404) and RFC 4868 section
/// 2.7.2 (AUTH test cases 1 to 4).
#[test]
fn dp_3_hmac() {
    let jefe = b"what do ya want for nothing?".as_slice();
    let count = |from: u8, to: u8| (from..=to).collect::<Vec<u8>>();
    let sha1 = Integrity::HmacSha1_96;
    let sha256 = Integrity::HmacSha2_256_128;
    let sha384 = Integrity::HmacSha2_384_192;
    let sha512 = Integrity::HmacSha2_512_256;
    let cases: [(Integrity, Vec<u8>, &[u8], &str); 15] = [
        (sha1, vec![0x0b; 20], b"Hi There", "b617318655057264e28bc0b6"),
        (sha1, vec![0xaa; 20], &[0xdd; 50], "125d7342b9ac11cd91a39af4"),
        (sha1, vec![0x0c; 20], b"Test With Truncation", "4c1a03424b55e07fe7f27be1"),
        (sha256, vec![0x0b; 32], b"Hi There", "198a607eb44bfbc69903a0f1cf2bbdc5"),
        (sha256, b"Jefe".repeat(8), jefe, "167f928588c5cc2eef8e3093caa0e87c"),
        (sha256, vec![0xaa; 32], &[0xdd; 50], "cdcb1220d1ecccea91e53aba3092f962"),
        (sha256, count(1, 32), &[0xcd; 50], "372efcf9b40b35c2115b1346903d2ef4"),
        (sha384, vec![0x0b; 48], b"Hi There", "b6a8d5636f5c6a7224f9977dcf7ee6c7fb6d0c48cbdee973"),
        (sha384, b"Jefe".repeat(12), jefe, "2c7353974f1842fd66d53c452ca42122b28c0b594cfb184d"),
        (sha384, vec![0xaa; 48], &[0xdd; 50], "809f439be00274321d4a538652164b53554a508184a0c316"),
        (
            sha384,
            [count(1, 32), count(10, 25)].concat(),
            &[0xcd; 50],
            "5b540085c6e6358096532b2493609ed1cb298f774f87bb5c",
        ),
        (
            sha512,
            vec![0x0b; 64],
            b"Hi There",
            "637edc6e01dce7e6742a99451aae82df23da3e92439e590e43e761b33e910fb8",
        ),
        (
            sha512,
            b"Jefe".repeat(16),
            jefe,
            "cb370917ae8a7ce28cfd1d8f4705d6141c173b2a9362c15df235dfb251b15454",
        ),
        (
            sha512,
            vec![0xaa; 64],
            &[0xdd; 50],
            "2ee7acd783624ca9398710f3ee05ae41b9f9b0510c87e49e586cc9bf961733d8",
        ),
        (
            sha512,
            count(1, 64),
            &[0xcd; 50],
            "5e6688e5a3daec826ca32eaea224eff5e700628947470e13ad01302561bab108",
        ),
    ];
    for (integrity, key, message, icv) in cases {
        let icv = hex(icv);
        let key = MacKey::new(integrity, &key).unwrap();
        let mut made = vec![0xa5; key.icv_len().into()];
        key.sign(message, None, &mut made);
        assert_eq!(made, icv, "{integrity:?}");
        assert!(key.verify(message, None, &icv));
        assert!(!key.verify(message, Some(0), &icv), "the high half of the number is covered");
        assert!(!key.verify(message, None, &icv[..icv.len() - 1]), "a cut ICV is none");
        assert!(!key.verify(message, None, &[]), "no ICV is none");
    }
}

#[rustfmt::skip]
const MCGREW_GCM: [Packet; 14] = [
    Packet {
        key: "4c80cdefbb5d10da906ac73c3613a6342e443b68",
        header: "000043218765432100000000",
        iv: "4956ed7e3b244cfe",
        plaintext: "45000048699a000080114db7c0a80102c0a801010a9bf15638d301000001000000000000045f736970045f756470\
             037369700963796265726369747902646b000021000101020201",
        sealed: "fecf537e729d5b07dc30df528dd22b768d1b98736696a6fd348509fa13ceac34cfa2436f14a3f3cf65925bf1f4a1\
             3c5d15b21e1884f5ff6247aeabb786b93bce61bc17d768fd9732",
        icv: "459018148f6cbe722fd04796562dfdb4",
    },
    Packet {
        key: "feffe9928665731c6d6a8f9467308308cafebabe",
        header: "0000a5f80000000a",
        iv: "facedbaddecaf888",
        plaintext: "4500003e698f000080114dccc0a80102c0a801010a980035002a2343b2d001000001000000000000037369700963\
             796265726369747902646b00000100010001",
        sealed: "deb22cd9b07c72c16e3a65beeb8df304a5a5897d33ae530f1ba76d5d114d2a5c3de81827c10e9a4f51330d0eec41\
             6642cfbb85a5b47e48a4ec3b9ba95d918bd1",
        icv: "83b70d3aa8bc6ee4c309e9d85a41ad4a",
    },
    Packet {
        key: "abbccddef00112233445566778899aababbccddef00112233445566778899aab11223344",
        header: "4a2cbfe300000002",
        iv: "0102030405060708",
        plaintext: "4500003069a6400080062690c0a801029389155e0a9e008b2dc57ee0000000007002400020bf0000020405b40101\
             040201020201",
        sealed: "ff425c9b724599df7a3bcd510194e00d6a78107f1b0b1cbf06efae9d65a5d763748a637985771d347f0545659f14\
             e99def842d8e",
        icv: "b335f4eecfdbf831824b4c4915956c96",
    },
    Packet {
        key: "0000000000000000000000000000000000000000",
        header: "0000000000000001",
        iv: "0000000000000000",
        plaintext: "4500003c99c500008001cb7a40679318010101010800075c020044006162636465666768696a6b6c6d6e6f707172\
             737475767761626364656667686901020201",
        sealed: "4688daf2f973a392732909c331d56d60f694abaa414b5e7ff5fdcdfff5e9a284456476492719ffb64de7d9dca1e1\
             d894bc3bd57873ed4d181d19d4d5c8c18af3",
        icv: "f821d496eeb096e98ad2b69e4799c71d",
    },
    Packet {
        key: "3de09874b388e6491988d0c3607eae1f57690e43",
        header: "42f67e3f1010101010101010",
        iv: "4e280000a2fca1a3",
        plaintext: "4500003c99c300008001cb7c40679318010101010800085c020043006162636465666768696a6b6c6d6e6f707172\
             737475767761626364656667686901020201",
        sealed: "fba2caa4853cf9f0f22cb10d86dd83b0fec75691cf1a04b00d1138ec9c35791765acbd8701ad79845bf9fe3fba48\
             7bc91755e6662b4c8d0d1f5e22739530320a",
        icv: "e0d731cc978ecafaeae88f00e80d6e48",
    },
    Packet {
        key: "3de09874b388e6491988d0c3607eae1f57690e43",
        header: "42f67e3f1010101010101010",
        iv: "4e280000a2fca1a3",
        plaintext: "4500001c42a200008001441f406793b6e00000020a00f5ff01020201",
        sealed: "fba2ca845e5df9f0f22c3e6e86dd831e1fc65792cd1af9130e1379ed",
        icv: "369f071f35e034be95f112e4e7d05d35",
    },
    Packet {
        key: "feffe9928665731c6d6a8f9467308308feffe9928665731ccafebabe",
        header: "0000a5f80000000a",
        iv: "facedbaddecaf888",
        plaintext: "45000028a4ad4000400678800a01038f0a010612802306b8cb712602dd6bb03e501016d075680001",
        sealed: "a5b1f8066029aea40e598b8122de02420938b3ab33f828e687b8858b5bfbdbd0315b27452144cc77",
        icv: "95457b9652037f5318027b5b4cd7a636",
    },
    Packet {
        key: "abbccddef00112233445566778899aabdecaf888",
        header: "000001000000000000000001",
        iv: "cafedebaceface74",
        plaintext: "4500004933ba00007f119106c3fb1d10c2b1d326c02831ce0035dd7b800302d500004e20001e8c18d75b81dc91ba\
             a0476b91b924b280389d92c963bac046ec959b6266c04722b14923010101",
        sealed: "18a6fd42f72cbf4ab2a2ea901f73d814e3e7f243d95412e1c349c1d2fbec168f9190feebaf2cb01984e65863965d\
             7472b79da345e0e780191f0d2f0e0f496c226f2127b27db35724e7845d68",
        icv: "651f57e65f354f75ff17015769623436",
    },
    Packet {
        key: "abbccddef00112233445566778899aababbccddef00112233445566778899aab73616c74",
        header: "17405e67156f3126dd0db99b",
        iv: "616e640169766563",
        plaintext: "45080028732c00004006e9f90a0106120a01038f06b88023dd6bafbecb71260250101f646d540001",
        sealed: "f2d69ecdbd5a0d5b8d5ef38bad4da58d1f278fde98ef67549d524a3018d9a57ff4d3a31ce673119e",
        icv: "451626c2415771e3b7eebca614c89b35",
    },
    Packet {
        key: "3de09874b388e6491988d0c3607eae1f57690e43",
        header: "42f67e3f1010101010101010",
        iv: "4e280000a2fca1a3",
        plaintext: "45000049333e00007f119182c3fb1d10c2b1d326c02831ce0035cb458003025b000001e0001e8c18d65759d52284\
             a0352c71475c8880391c764d6e5ee0496b325ae270c03899493915010101",
        sealed: "fba2cad12fc1f9f00d3cebf305410db83d7784b607323d220f24b0a97d54182800cadb0f68d99ef0e0c0c89ae9be\
             a8884e52d65bc1afd0740f742444747b5b39ab533163aad4550ee5160975",
        icv: "cdb608c5769189609763b8e18caa81e2",
    },
    Packet {
        key: "abbccddef00112233445566778899aababbccddef00112233445566778899aab73616c74",
        header: "17405e67156f3126dd0db99b",
        iv: "616e640169766563",
        plaintext: "636973636f0172756c657301746865016e6574776501646566696e6501746865746563686e6f6c6f676965730174\
             68617477696c6c01646566696e65746f6d6f72726f7701020201",
        sealed: "d4b7ed86a1777f2ea13d6973d324c69e7b43f826fb56831226508bebd2dceb18d0a6df10e5487df074113e14c641\
             024e3e6773d91a62ee429b043a10e3efe6b012a49363412364f8",
        icv: "c0cac587f249e56b11e24f30e44ccc76",
    },
    Packet {
        key: "7d773d00c144c525ac619d18c84a3f47d9664267",
        header: "335467aeffffffff",
        iv: "43457e9182443bc6",
        plaintext: "01020201",
        sealed: "437f866b",
        icv: "cb3f699fe9b0822bac961c4504bef270",
    },
    Packet {
        key: "abbccddef00112233445566778899aabdecaf888",
        header: "000001000000000000000001",
        iv: "cafedebaceface74",
        plaintext: "746f016265016f72016e6f7401746f0162650001",
        sealed: "29c9fc69a197d038ccdd14e2ddfcaa0543332164",
        icv: "412503524303ed3c6c5f283843af8c3e",
    },
    Packet {
        key: "6c6567616c697a656d6172696a75616e61616e64646f69746265666f726569617475726e",
        header: "796b6963ffffffffffffffff",
        iv: "333021696765746d",
        plaintext: "45000030da3a00008001df3bc0a80005c0a800010800c6cd020007006162636465666768696a6b6c6d6e6f707172\
             737401020201",
        sealed: "f97ab2aa356d8edce17644ac8c78e25dd24dedbb29ebf1b64a274b39b49c3a864cd3d78ca4ae68a32b42458fb57d\
             be821dcc63b9",
        icv: "d0937ba2945f669368661a329fb4c053",
    },
];
