//! The terminal: raw mode, the alternate screen, keys and signals. The terminal is restored at the end of the command,
//! also after a panic.

use std::io::{self, Read, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TermionBackend;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use super::app::{Action, App};
use super::figures::Rates;
use super::keys::Key;
use super::sampling::{Event, Sampling};
use super::screen::{self, Palette};
use crate::error::{Error, Result};
use crate::sys::process::threads;

/// Longest time between two frames, so that the age of the figures is up to date.
const FRAME_INTERVAL: Duration = Duration::from_secs(1);

const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// Time in which the command ends after a signal. After that, another signal ends the process even if the terminal
/// accepts no output.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// The settings of the terminal before this command.
static BEFORE: OnceLock<Termios> = OnceLock::new();

/// Set by a panic of any thread.
static PANICKED: AtomicBool = AtomicBool::new(false);

/// The terminal in raw mode; drop restores it.
struct Raw;

impl Raw {
    fn enter() -> Result<Raw> {
        let failed = |error: io::Error| Error::failed("cannot use the terminal").because(error);
        let before = tcgetattr(io::stdin()).map_err(|e| failed(e.into()))?;
        let mut raw = before.clone();
        raw.make_raw();
        let _ = BEFORE.set(before);
        let guard = Raw;
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).map_err(|e| failed(e.into()))?;
        write(ENTER).map_err(failed)?;
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICKED.store(true, Ordering::Relaxed);
            restore();
            print(panic);
        }));
        Ok(guard)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Errors have no remedy: the terminal is gone.
fn restore() {
    restore_settings();
    let _ = write(LEAVE);
}

/// Does not wait for a terminal that accepts no output.
fn restore_settings() {
    if let Some(before) = BEFORE.get() {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
    }
}

/// Shows samples until a key or a signal ends the command.
///
/// # Errors
/// Returns an error if the terminal cannot be used.
pub fn run(
    mut app: App,
    sampling: &mut Sampling,
    sender: Sender<Event>,
    events: &Receiver<Event>,
) -> Result<()> {
    watch_signals(sender.clone())?;
    let raw = Raw::enter()?;
    watch_keys(sender)?;
    let shown = show(&mut app, sampling, events);
    drop(raw);
    match shown {
        _ if PANICKED.load(Ordering::Relaxed) => Err(Error::failed("a thread panicked")),
        other => other,
    }
}

fn show(app: &mut App, sampling: &mut Sampling, events: &Receiver<Event>) -> Result<()> {
    let failed = |error: io::Error| Error::failed("cannot write to the terminal").because(error);
    let mut terminal = Terminal::new(TermionBackend::new(io::stdout())).map_err(failed)?;
    let (palette, mut rates) = (Palette::of_environment(), Rates::default());
    while !PANICKED.load(Ordering::Relaxed) {
        app.waits(sampling.waits());
        app.set_height(screen::clone_rows(terminal.size().map_err(failed)?.height, app));
        terminal.draw(|frame| screen::draw(frame.buffer_mut(), app, palette)).map_err(failed)?;
        let wait = sampling.poll(|| app.shown())?;
        match events.recv_timeout(wait.min(FRAME_INTERVAL)) {
            Ok(Event::Key(key)) if app.key(key) == Action::Quit => break,
            Ok(Event::Ended) | Err(RecvTimeoutError::Disconnected) => break,
            Ok(Event::Sampled(number, sample)) => {
                if let Some(sample) = sampling.accept(number, *sample) {
                    app.sampled(sample.map(|sample| rates.add(sample)));
                }
            }
            Ok(Event::Key(_) | Event::Resized) | Err(RecvTimeoutError::Timeout) => {}
        }
    }
    Ok(())
}

fn watch_keys(sender: Sender<Event>) -> Result<()> {
    threads::start(move || {
        let mut bytes = [0; 64];
        // The end of the input: the terminal is gone.
        while let Ok(length @ 1..) = io::stdin().read(&mut bytes) {
            for key in Key::parse(&bytes[..length]) {
                if sender.send(Event::Key(key)).is_err() {
                    return;
                }
            }
        }
        let _ = sender.send(Event::Ended);
    })?;
    Ok(())
}

fn watch_signals(sender: Sender<Event>) -> Result<()> {
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGWINCH]);
    let mut signals = signals.map_err(|e| Error::failed("cannot handle signals").because(e))?;
    threads::start(move || {
        let mut has_ended = false;
        for signal in signals.forever() {
            if signal != SIGWINCH && std::mem::replace(&mut has_ended, true) {
                // The first signal ends the command, unless the terminal accepts no output.
                std::thread::sleep(END_TIMEOUT);
                restore_settings();
                std::process::exit(128 + signal);
            }
            let event = if signal == SIGWINCH { Event::Resized } else { Event::Ended };
            if sender.send(event).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use std::fs::File;
    use std::process::{Command, Stdio};

    /// Set for the child of the test below.
    const CHILD: &str = "STENCIL_TEST_PANIC";

    /// The test runs itself as the child, in a terminal.
    #[test]
    fn the_terminal_is_restored_before_the_message_of_a_panic() {
        if std::env::var_os(CHILD).is_some() {
            let _raw = Raw::enter().unwrap();
            // In another thread, as in a measurement.
            let thread = std::thread::spawn(|| panic!("a test"));
            assert!(thread.join().is_err() && PANICKED.load(Ordering::Relaxed));
            return;
        }
        let mut master = File::from(openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap());
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let side = File::options().read(true).write(true).open(name).unwrap();
        let settings = || format!("{:?}", tcgetattr(&side).unwrap());
        let before = settings();
        let stdio = || Stdio::from(side.try_clone().unwrap());
        let name = "cli::top::terminal::tests::the_terminal_is_restored_before_the_message_of_a_panic";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(CHILD, "1")
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        let (mut text, mut piece) = (String::new(), [0; 4096]);
        while !text.contains("test result") {
            let length = master.read(&mut piece).unwrap();
            text.push_str(&String::from_utf8_lossy(&piece[..length]));
        }
        assert!(child.wait().unwrap().success(), "{text}");
        assert_eq!(settings(), before, "{text}");
        let (entered, left) = (text.find(ENTER).unwrap(), text.find(LEAVE).unwrap());
        assert!(entered < left && left < text.find("a test").unwrap(), "{text}");
    }
}
