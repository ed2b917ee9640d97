{{/* The labels of everything. */}}
{{- define "troth.labels" -}}
app.kubernetes.io/part-of: troth
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
{{- end }}

{{- define "troth.server.selector" -}}
app.kubernetes.io/name: troth-server
{{- end }}

{{- define "troth.agent.selector" -}}
app.kubernetes.io/name: troth-agent
{{- end }}

{{- define "troth.keeper.selector" -}}
app.kubernetes.io/name: troth-keeper
{{- end }}

{{- define "troth.server.namespace" -}}
{{ .Values.serverNamespace | default .Release.Namespace }}
{{- end }}

{{- define "troth.server.image" -}}
{{ .Values.image.server }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "troth.agent.image" -}}
{{ .Values.image.agent }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* Who is left alone: Kubernetes' own, and ours, without which nothing else would start. */}}
{{- define "troth.uncaptured" -}}
{{ concat (list "kube-system" (include "troth.server.namespace" .) .Values.nodeNamespace) .Values.capture.uncapturedNamespaces | uniq | join "," }}
{{- end }}

{{/* What every container has in common. The capabilities follow where one needs any. */}}
{{- define "troth.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
{{- end }}

{{- define "troth.signer.name" -}}troth.dev/svid{{- end }}

{{/* The name of the CTB: the signer's, with colons, and a name of our own. */}}
{{- define "troth.bundle.name" -}}troth.dev:svid:{{ .Values.trustDomain }}{{- end }}

{{/* The namespaces whose ConfigMap troth-bundle the server keeps. */}}
{{- define "troth.bundle.namespaces" -}}
{{- $all := .Values.trustBundle.namespaces }}
{{- if eq .Values.trustBundle.source "ConfigMap" }}{{ $all = prepend $all .Values.nodeNamespace }}{{ end }}
{{- $all | uniq | join "," }}
{{- end }}
