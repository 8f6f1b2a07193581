//! The client's key in a PKCS#11 token (SoftHSM) and in a TPM (swtpm), with the commands that are shipped for them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use offshoot::fetch::{self, ClientKey, Fault, Reply, Server, ServerConfig};
use rcgen::{CertificateParams, KeyPair, PKCS_RSA_SHA256};

use crate::server::{Answer, Identity, Server as TestServer};

struct Bench {
    identity: Identity,
    server: TestServer,
    directory: tempfile::TempDir,
}

impl Bench {
    async fn start() -> Self {
        let identity = Identity::for_known_clients();
        let server = TestServer::start(Some(&identity), |_| Answer::new(200, "known")).await;
        Self {
            identity,
            server,
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn client_key(&self) -> PathBuf {
        self.identity.directory.path().join("client-key.pem")
    }

    fn signing(&self, command: &[&str]) -> ServerConfig {
        ServerConfig {
            ca: Some(self.identity.ca()),
            identity: Some(fetch::Identity {
                chain: self.identity.directory.path().join("client.pem"),
                key: ClientKey::Signer(command.iter().map(ToString::to_string).collect()),
            }),
            ..ServerConfig::new(self.server.url())
        }
    }

    async fn ask(&self, config: ServerConfig) -> Result<Reply, Fault> {
        let mut server = Server::new(config, "offshoot/0.1.0").unwrap();
        let reply = server.small("file", 100, None).await;
        reply.map_err(|error| error.fault)
    }

    async fn assert_known(&self, config: ServerConfig) {
        let reply = self.ask(config).await;
        assert!(
            matches!(&reply, Ok(Reply::Body { bytes, .. }) if bytes == "known"),
            "{reply:?}"
        );
    }
}

fn shipped(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("signers")
        .join(name)
        .display()
        .to_string()
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}

#[tokio::test]
async fn a_key_behind_pkcs11_shows_who_the_device_is() {
    let bench = Bench::start().await;
    let configuration = bench.path("softhsm.conf");
    std::fs::create_dir(bench.path("tokens")).unwrap();
    let tokens = format!(
        "directories.tokendir = {}\n",
        bench.path("tokens").display()
    );
    std::fs::write(&configuration, tokens).unwrap();
    std::fs::write(bench.path("pin"), "1234\n").unwrap();
    let softhsm = |arguments: &[&str]| {
        let mut command = Command::new("softhsm2-util");
        command.args(arguments).env("SOFTHSM2_CONF", &configuration);
        command
    };
    run(&mut softhsm(&[
        "--init-token",
        "--free",
        "--label=t",
        "--pin=1234",
        "--so-pin=1234",
    ]));
    run(softhsm(&[
        "--token=t",
        "--label=client",
        "--id=01",
        "--pin=1234",
        "--import",
    ])
    .arg(bench.client_key()));
    let variable = format!("SOFTHSM2_CONF={}", configuration.display());
    let module = "/usr/lib/softhsm/libsofthsm2.so";
    let signer = shipped("offshoot-sign-pkcs11");
    let with = |pin: &str| bench.signing(&["env", &variable, &signer, module, "client", pin]);
    bench.assert_known(with(&bench.text("pin"))).await;
    std::fs::write(bench.path("wrong"), "4321\n").unwrap();
    let refused = bench.ask(with(&bench.text("wrong"))).await;
    assert!(
        matches!(refused, Err(Fault::NotSigned { .. })),
        "{refused:?}"
    );
}

/// A TPM that is a process.
struct Tpm {
    process: Child,
    socket: String,
}

impl Drop for Tpm {
    fn drop(&mut self) {
        // It may have gone by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Tpm {
    fn start(bench: &Bench) -> Self {
        let state = bench.path("tpm");
        std::fs::create_dir(&state).unwrap();
        let socket = bench.path("tpm.socket").display().to_string();
        let process = Command::new("swtpm")
            .args(["socket", "--tpm2", "--flags=not-need-init,startup-clear"])
            .arg(format!("--tpmstate=dir={}", state.display()))
            .arg(format!("--server=type=unixio,path={socket}"))
            .arg(format!("--ctrl=type=unixio,path={socket}.ctrl"))
            .spawn()
            .unwrap();
        let tpm = Self { process, socket };
        while !Path::new(&tpm.socket).exists()
            || !Path::new(&format!("{}.ctrl", tpm.socket)).exists()
        {
            std::thread::yield_now();
        }
        tpm
    }

    fn variable(&self) -> String {
        format!("TPM2TOOLS_TCTI=swtpm:path={}", self.socket)
    }

    /// What the tools leave in the TPM takes its room: there is no resource manager here.
    fn tool(&self, bench: &Bench, words: &str) {
        for words in [words, "tpm2_flushcontext --transient-object"] {
            let variable = self.variable();
            let mut command = Command::new("env");
            command.arg(variable).args(words.split(' '));
            run(command.current_dir(bench.directory.path()));
        }
    }
}

#[tokio::test]
async fn a_key_in_a_tpm_shows_who_the_device_is() {
    let bench = Bench::start().await;
    let tpm = Tpm::start(&bench);
    let key = bench.client_key().display().to_string();
    tpm.tool(&bench, "tpm2_createprimary -Q -C o -G ecc -c primary");
    tpm.tool(
        &bench,
        &format!("tpm2_import -Q -C primary -G ecc -i {key} -u public -r private"),
    );
    tpm.tool(
        &bench,
        "tpm2_load -Q -C primary -u public -r private -c key",
    );
    tpm.tool(&bench, "tpm2_evictcontrol -Q -C o -c key 0x81000001");
    let (variable, signer) = (tpm.variable(), shipped("offshoot-sign-tpm2"));
    bench
        .assert_known(bench.signing(&["env", &variable, &signer, "0x81000001"]))
        .await;
    let refused = bench
        .ask(bench.signing(&["env", &variable, &signer, "0x81000002"]))
        .await;
    assert!(
        matches!(refused, Err(Fault::NotSigned { .. })),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_signer_that_fails_hangs_or_lies_is_refused_by_name() {
    let bench = Bench::start().await;
    // `true` makes no signature, `tail` never ends, and nobody has the last one.
    let hangs = ["tail", "--follow", "/dev/null", "--lines=1"];
    for command in [&["true"][..], &["false"], &["/nowhere"], &hangs] {
        let refused = bench.ask(bench.signing(command)).await;
        assert!(
            matches!(refused, Err(Fault::NotSigned { .. })),
            "{refused:?}"
        );
    }
    let lies = bench.ask(bench.signing(&["echo"])).await;
    assert!(
        matches!(lies, Err(Fault::Interrupted { .. } | Fault::Tls(_))),
        "{lies:?}"
    );
    assert_eq!(bench.server.requests(), []);
}

#[tokio::test]
async fn a_key_that_no_signer_can_sign_with_is_refused_at_the_start() {
    let bench = Bench::start().await;
    let mut config = bench.signing(&["true"]);
    let rsa = "rsa.pem";
    let key = Command::new("openssl")
        .args(["genpkey", "-quiet", "-algorithm", "RSA"])
        .output()
        .unwrap();
    let key = KeyPair::from_pem_and_sign_algo(
        std::str::from_utf8(&key.stdout).unwrap(),
        &PKCS_RSA_SHA256,
    );
    let certificate = CertificateParams::new([])
        .unwrap()
        .self_signed(&key.unwrap())
        .unwrap();
    std::fs::write(bench.path(rsa), certificate.pem()).unwrap();
    config.identity.as_mut().unwrap().chain = bench.path(rsa);
    assert!(Server::new(config.clone(), "offshoot/0.1.0").is_err());
    config = bench.signing(&[]);
    assert!(Server::new(config, "offshoot/0.1.0").is_err());
}
