//! Whoever answers instead of a web server, byte by byte and frame by frame.

use std::io;
use std::pin::Pin;

use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use super::*;

/// What somebody who is no web server does with a connection.
type Raw = Box<dyn Fn(TcpStream, TlsAcceptor) -> Doing + Send>;
type Doing = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// Stands between the device and the server: brings it what the server says, and then does something else.
struct Impostor {
    port: u16,
    /// It is done with the server.
    alone: watch::Sender<bool>,
}

impl Impostor {
    fn start(server: u16, tls: TlsAcceptor, raw: Raw) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (alone, told) = watch::channel(false);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async move {
                let listener = TcpListener::from_std(listener).unwrap();
                while let Ok((mut tcp, _)) = listener.accept().await {
                    let mut told = told.clone();
                    if *told.borrow_and_update() {
                        // Ends when the device has had enough.
                        tokio::spawn(raw(tcp, tls.clone()));
                    } else {
                        tokio::spawn(async move {
                            let mut server = TcpStream::connect(("127.0.0.1", server)).await?;
                            tokio::select! {
                                _ = copy_bidirectional(&mut tcp, &mut server) => {}
                                _ = told.changed() => {}
                            }
                            io::Result::Ok(())
                        });
                    }
                }
            });
        });
        Self { port, alone }
    }
}

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [
        length[1], length[2], length[3], kind, flags, 0, 0, 0, stream,
    ];
    [&head[..], payload].concat()
}

/// Shakes hands as HTTP/2 does, and says so once the device has asked for something. What the device sends after that is forgotten.
async fn http2(tcp: TcpStream, tls: TlsAcceptor) -> io::Result<impl AsyncWrite + Unpin + Send> {
    let (mut read, mut write) = tokio::io::split(tls.accept(tcp).await?);
    write.write_all(&frame(4, 0, 0, b"")).await?;
    read.read_exact(&mut [0; 24]).await?;
    loop {
        let mut head = [0; 9];
        read.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        read.read_exact(&mut vec![0; length as usize]).await?;
        match (head[3], head[4] & 1) {
            (1, _) => break,
            (4, 0) => write.write_all(&frame(4, 1, 0, b"")).await?,
            _ => {}
        }
    }
    tokio::spawn(async move { tokio::io::copy(&mut read, &mut tokio::io::sink()).await });
    Ok(write)
}

/// One thing, and another again and again, in pieces of some size.
fn flood(first: Vec<u8>, again: Vec<u8>) -> Raw {
    let again = again.repeat(1 + 4000 / again.len());
    Box::new(move |tcp, tls| {
        let (first, again) = (first.clone(), again.clone());
        Box::pin(async move {
            let mut stream = http2(tcp, tls).await?;
            stream.write_all(&first).await?;
            loop {
                stream.write_all(&again).await?;
            }
        })
    })
}

#[test]
fn whoever_answers_instead_of_a_web_server_is_refused_by_name() {
    // `:status: 200`
    let status = || frame(1, 4, 1, &[0x88]);
    let interim = || frame(1, 4, 1, b"\x08\x03103");
    let literal = [&[0x00, 0x01, b'x', 0x7f, 0x81, 0x7f][..], &[b'y'; 16_384]].concat();
    let plain = |answer: &'static [u8], then_holds: bool| -> Raw {
        Box::new(move |mut tcp, _| {
            Box::pin(async move {
                tcp.write_all(answer).await?;
                if then_holds {
                    tcp.read_to_end(&mut Vec::new()).await?;
                }
                Ok(())
            })
        })
    };
    let cases: Vec<(&str, Raw, &str)> = vec![
        ("silence", plain(b"", true), "unreachable"),
        ("hangs up", plain(b"", false), "unreachable"),
        (
            "another protocol",
            plain(b"SSH-2.0-OpenSSH_10.0\r\n", true),
            "tls",
        ),
        (
            "goes away",
            flood(frame(7, 0, 0, &[0; 8]), frame(7, 0, 0, &[0; 8])),
            "interrupted",
        ),
        (
            "takes it back",
            flood(frame(3, 0, 1, &[0, 0, 0, 2]), frame(6, 0, 0, &[0; 8])),
            "interrupted",
        ),
        (
            "pushes",
            flood(frame(5, 4, 1, &[0, 0, 0, 2, 0x88]), vec![0]),
            "interrupted",
        ),
        (
            "endless header block",
            flood(frame(1, 0, 1, &[0x88]), frame(9, 0, 1, &[0x88; 100])),
            "interrupted",
        ),
        (
            "endless header",
            flood(
                frame(1, 0, 1, &literal[..16_384]),
                frame(9, 0, 1, &[b'y'; 16_384]),
            ),
            "interrupted",
        ),
        (
            "endless early hints",
            flood(Vec::new(), interim()),
            "flooded",
        ),
        (
            "frame too large",
            flood(status(), frame(0, 0, 1, &[b'x'; 1 << 20])),
            "interrupted",
        ),
        (
            "endless body",
            flood(status(), frame(0, 0, 1, &[b'x'; 16_384])),
            "too-long",
        ),
        (
            "body of nothing",
            flood(status(), frame(0, 0, 1, b"")),
            "interrupted",
        ),
        (
            "pings instead of a body",
            flood(status(), frame(6, 0, 0, &[0; 8])),
            "flooded",
        ),
        (
            "pings instead of a head",
            flood(Vec::new(), frame(6, 0, 0, &[0; 8])),
            "flooded",
        ),
        (
            "settings instead of a body",
            flood(status(), frame(4, 0, 0, b"")),
            "flooded",
        ),
        (
            "windows instead of a body",
            flood(status(), frame(8, 0, 0, &[0, 0, 0, 1])),
            "flooded",
        ),
        (
            "frames of no known kind",
            flood(status(), frame(99, 0, 0, &[0; 100])),
            "flooded",
        ),
    ];
    let mut ledger = Ledger::default();
    let factory = Machine::new();
    for (name, raw, fault) in cases {
        let machine = factory.copy_speaking("h2");
        let tls = TlsAcceptor::from(machine.identity.tls.clone());
        let mut impostor = None;
        let mut attacked = Attacked::behind(machine, |server| {
            impostor.insert(Impostor::start(server, tls, raw)).port
        });
        attacked.machine.publish("two");
        attacked.begin(Box::new(|_, honest| honest));
        let impostor = impostor.unwrap();
        impostor.alone.send_replace(true);
        let (code, status) = attacked.daemon.status(&["check"]);
        assert_eq!(code, Some(7), "{name}: {status:?}");
        let failure = status.last_poll.unwrap().error.unwrap();
        ledger.refused(name, failure.fault == fault, &format!("{failure:?}"));
        ledger.grown(name, attacked.assert_bounded(name, 0));
        impostor.alone.send_replace(false);
        attacked.assert_recovers(name);
    }
    ledger.close();
}

#[test]
fn between_two_polls_nobody_makes_the_device_pay() {
    let (told, flooded) = std::sync::mpsc::channel();
    let raw: Raw = Box::new(move |tcp, tls| {
        let told = told.clone();
        Box::pin(async move {
            let mut stream = http2(tcp, tls).await?;
            // `:status: 304`
            stream.write_all(&frame(1, 5, 1, &[0x8b])).await?;
            let pings = frame(6, 0, 0, &[0; 8]).repeat(200);
            let mut bytes = 0;
            while stream.write_all(&pings).await.is_ok() {
                bytes += pings.len();
            }
            told.send(bytes).unwrap();
            Ok(())
        })
    });
    let machine = Machine::new().copy_speaking("h2");
    let tls = TlsAcceptor::from(machine.identity.tls.clone());
    let mut impostor = None;
    let attacked = Attacked::behind(machine, |server| {
        impostor.insert(Impostor::start(server, tls, raw)).port
    });
    let impostor = impostor.unwrap();
    impostor.alone.send_replace(true);
    assert_eq!(attacked.daemon.status(&["check"]).0, Some(0));
    // And whatever the sockets between them hold.
    let bytes = flooded.recv_timeout(PATIENCE).unwrap();
    assert!(bytes < 16 << 20, "{bytes}");
    impostor.alone.send_replace(false);
    attacked.assert_recovers("between two polls");
}
