//! Networks of a captured VM: each clone gets its own backend, MAC addresses and host ports.

use super::props::Props;
use super::rules::options;

/// Options of a user-mode network that refer to no host resource.
const USER_OPTIONS: [&str; 24] = [
    "type",
    "id",
    "netdev",
    "name",
    "ipv4",
    "ipv6",
    "net",
    "host",
    "ipv6-net",
    "ipv6-prefix",
    "ipv6-prefixlen",
    "ipv6-host",
    "restrict",
    "hostname",
    "dhcpstart",
    "dns",
    "ipv6-dns",
    "dnssearch",
    "domainname",
    "tftp-server-name",
    "bootfile",
    "model",
    "addr",
    "vectors",
];

/// Collects the networks of a command line.
#[derive(Debug, Default)]
pub struct Networks {
    cards: usize,
    unnamed: usize,
    ports: Vec<(String, String)>,
    /// True if the command line has a network option, so that QEMU adds no default network.
    pub given: bool,
    /// Options that are unsupported for clones, with the reason.
    pub refused: Vec<String>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

impl Networks {
    /// Returns the placeholder for the MAC address of the next network card.
    pub fn mac(&mut self) -> String {
        self.cards += 1;
        match self.cards {
            1 => "{mac}".into(),
            number => format!("{{mac:{}}}", number - 1),
        }
    }

    /// Converts a `-netdev`, `-nic` or `-net` option to that of clones.
    pub fn option(&mut self, option: &str, text: &str) -> Option<String> {
        self.given = true;
        let shown = format!("-{option} {text}");
        let Some(mut props) = Props::parse(text, "type").filter(|p| !p.has_braces()) else {
            self.refused.push(format!("{shown}: cannot parse its properties"));
            return None;
        };
        props.lead_with("type");
        let kind = props.get("type").unwrap_or_default().to_owned();
        match kind.as_str() {
            "none" if option != "netdev" => return Some(text.to_owned()),
            "nic" if option == "net" => {}
            "user" => self.user(&shown, &mut props)?,
            "tap" => self.tap(&shown, &mut props)?,
            "bridge" => {
                let unsupported =
                    unsupported(&props, &["type", "id", "br", "helper", "model", "mac", "name", "netdev"]);
                self.refuse_unsupported(&shown, &unsupported)?;
                self.shared(&shown);
            }
            other => {
                self.refused.push(format!("{shown}: unsupported network type {other}"));
                return None;
            }
        }
        // The launcher cuts the network off by this name (QMP set_link).
        if is_shared(&kind) && props.get("id").is_none() {
            self.unnamed += 1;
            props.set("id", &format!("stencil-net-{}", self.unnamed));
        }
        let address = if option == "net" { "macaddr" } else { "mac" };
        if option == "nic" || kind == "nic" {
            if option == "net" {
                let unsupported = unsupported(
                    &props,
                    &["type", "id", "netdev", "macaddr", "model", "name", "addr", "vectors"],
                );
                self.refuse_unsupported(&shown, &unsupported)?;
            }
            props.remove("macaddr");
            props.set(address, &self.mac());
        }
        Some(props.render("type"))
    }

    fn refuse_unsupported(&mut self, shown: &str, unsupported: &[String]) -> Option<()> {
        if unsupported.is_empty() {
            return Some(());
        }
        self.refused.push(format!("{shown}: a network with {}", unsupported.join(",")));
        None
    }

    fn user(&mut self, shown: &str, props: &mut Props) -> Option<()> {
        let known: Vec<&str> = USER_OPTIONS.iter().copied().chain(["hostfwd", "mac", "macaddr"]).collect();
        self.refuse_unsupported(shown, &unsupported(props, &known))?;
        let mut error = None;
        for rule in props.all_mut("hostfwd") {
            match self.forward(rule) {
                Some(changed) => *rule = changed,
                None => {
                    error = Some(format!(
                        "{shown}: invalid host forward '{rule}': expected \
                         [tcp|udp]:[HOSTADDR]:HOSTPORT-[GUESTADDR]:GUESTPORT"
                    ))
                }
            }
        }
        match error {
            Some(error) => {
                self.refused.push(error);
                None
            }
            None => Some(()),
        }
    }

    /// Replaces the host port of `[tcp|udp]:[HOSTADDRESS]:HOSTPORT-[ADDRESS]:PORT` by a placeholder.
    fn forward(&mut self, rule: &str) -> Option<String> {
        let (host, guest) = rule.rsplit_once('-')?;
        let (protocol, place) = host.split_once(':')?;
        let (address, port) = place.rsplit_once(':')?;
        let (_, inner) = guest.rsplit_once(':')?;
        let is_number = |text: &str| text.parse::<u16>().is_ok();
        if !matches!(protocol, "" | "tcp" | "udp") || !is_number(port) || !is_number(inner) {
            return None;
        }
        let protocol = if protocol.is_empty() { "tcp" } else { protocol };
        // A name stands for one host port, which may be forwarded once for TCP and once for UDP.
        let free = |name: &str| !self.ports.iter().any(|(n, p)| n == name && p == protocol);
        let number = if free(inner) {
            inner.to_owned()
        } else {
            (1..).map(|n: u32| n.to_string()).find(|n| free(n))?
        };
        self.ports.push((number.clone(), protocol.to_owned()));
        Some(format!("{protocol}:{address}:{{port:{number}}}-{guest}"))
    }

    fn tap(&mut self, shown: &str, props: &mut Props) -> Option<()> {
        let known = [
            "type",
            "id",
            "ifname",
            "script",
            "downscript",
            "br",
            "helper",
            "sndbuf",
            "vnet_hdr",
            "vhost",
            "queues",
            "poll-us",
            "model",
            "mac",
            "macaddr",
            "name",
            "netdev",
        ];
        let mut unsupported = unsupported(props, &known);
        let script = props.get("script").unwrap_or("no");
        if script == "no" && props.get("helper").is_none() {
            unsupported.insert(0, "no script that sets up a device for each clone".into());
        }
        self.refuse_unsupported(shown, &unsupported)?;
        // Each clone gets its own tap device, whose name the kernel chooses.
        props.remove("ifname");
        self.shared(shown);
        Some(())
    }

    fn shared(&mut self, shown: &str) {
        self.warnings.push(format!(
            "{shown}: clones have the MAC and IP address of the captured guest, so this network of each clone is cut off \
             until QMP set_link with up=true"
        ));
    }
}

/// Returns true for a network type that connects the guest to other hosts at layer 2.
fn is_shared(kind: &str) -> bool {
    matches!(kind, "tap" | "bridge")
}

/// Returns the names of the networks in a command line that clones share with the captured guest.
pub fn shared(argv: &[String]) -> Vec<String> {
    let name = |(option, value): (&str, Option<&str>)| {
        let props =
            matches!(option, "netdev" | "nic" | "net").then(|| Props::parse(value?, "type")).flatten()?;
        props.get("id").filter(|_| props.get("type").is_some_and(is_shared)).map(str::to_owned)
    };
    options(argv).into_iter().filter_map(name).collect()
}

/// Returns the properties that are not in `known`.
fn unsupported(props: &Props, known: &[&str]) -> Vec<String> {
    props
        .iter()
        .filter(|(key, _)| !known.contains(key))
        .map(|(key, value)| format!("{key}={value}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_get_separate_host_ports() {
        let mut all = Networks::default();
        let text =
            "user,id=n0,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::5353-10.0.2.15:22,hostfwd=tcp::1-:22";
        assert_eq!(
            all.option("netdev", text).unwrap(),
            "user,id=n0,hostfwd=tcp:127.0.0.1:{port:22}-:22,hostfwd=udp::{port:22}-10.0.2.15:22,\
             hostfwd=tcp::{port:1}-:22"
        );
        assert!(all.given);
        assert_eq!(
            all.option("nic", "user,model=e1000,mac=52:54:00:12:34:56").unwrap(),
            "user,model=e1000,mac={mac}"
        );
        assert_eq!(all.option("net", "nic,model=e1000").unwrap(), "nic,model=e1000,macaddr={mac:1}");
        assert_eq!(all.option("net", "none").unwrap(), "none");
        assert_eq!(all.refused, Vec::<String>::new());
    }

    #[test]
    fn refuses_host_networks_by_name() {
        for (text, words) in [
            ("tap,id=n0,ifname=tap0,script=no", "no script"),
            ("tap,id=n0", "no script"),
            ("tap,id=n0,fd=3,script=/x", "fd=3"),
            ("vhost-user,id=n0,chardev=c", "unsupported network type vhost-user"),
            ("socket,id=n0,listen=:1", "unsupported network type socket"),
            ("user,id=n0,smb=/srv", "smb=/srv"),
            ("user,id=n0,guestfwd=tcp:1-cmd:x", "guestfwd="),
            ("user,id=n0,hostfwd=unix:/x-:1", "invalid host forward"),
        ] {
            let mut all = Networks::default();
            assert_eq!(all.option("netdev", text), None, "{text}");
            assert!(all.refused[0].contains(words), "{text}: {:?}", all.refused);
        }
        let mut all = Networks::default();
        let tap = all.option("netdev", "tap,id=n0,ifname=tap3,script=/etc/up,vhost=on").unwrap();
        assert_eq!(tap, "tap,id=n0,script=/etc/up,vhost=on");
        assert!(all.warnings[0].contains("MAC"));
    }
}
